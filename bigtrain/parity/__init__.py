"""The parity gate: does a mesh compute what one device computes?

`shrink` makes a small copy of an experiment on a mesh with the same axes (shrink.py), whose batches
are made up (synthetic.py). `Reference` is its steps on one device, and `compare` what a mesh makes
of the same steps (steps.py): a Report, with every tensor by name and the layer where they part
(report.py). `command` is `bigtrain parity`; its virtual devices, of one process or two, are
virtual.py.

It does not look at speed, at collectives (a right result may be slow), or at what float32 hides:
bfloat16, and what only large sizes show.
"""

from bigtrain.parity.report import Report
from bigtrain.parity.shrink import shrink
from bigtrain.parity.steps import Reference, compare

__all__ = ["Reference", "Report", "compare", "shrink"]
