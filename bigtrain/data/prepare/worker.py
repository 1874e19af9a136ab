"""Imported by the server that the workers of a local preparation are forked from, and nobody else.

Importing it has effects on the process: Ctrl-C is left to the command, and every process forked
from here ends soon after its parent, without a word on the pipes that it then finds closed.
"""

import os
import signal
import sys

import bigtrain.data.prepare.run  # noqa: F401  Once here, not in every worker.
from bigtrain.data.prepare.engine import end_with_parent


def _begin() -> None:
  sys.stderr = open(os.devnull, "w")  # noqa: SIM115  What fails is raised in the command.
  end_with_parent()


signal.signal(signal.SIGINT, signal.SIG_IGN)
os.register_at_fork(after_in_child=_begin)
