"""The report: what runs recorded, as one HTML file that needs nothing else.

It reads a run's records and never its experiment file, its weights or its data, and so needs no
accelerator and runs no code of the run. The page has no script: charts are drawn here, what is
under the pointer is told by their titles.
"""
