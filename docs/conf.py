"""Sphinx: `sphinx-build docs docs/_build`."""

project = "bigtrain"
extensions = ["myst_nb"]  # Pages are Markdown or notebooks; these are executed when they are built.
exclude_patterns = ["_build"]
