"""The run of tests/runs.py with a trouble in its data, for the command line.

$TROUBLE says which, as in "hang 1 40": in process 1 at the first example from 40 on, "hang" waits
for ever, "hold" does so with Python's lock, "fail" raises, "slow" takes half a second each time.
"save 1" is a SIGTERM to process 1 in its first save, and so for any phase of `Run.away`. "unsaved 0
16" is a save of step 16 that process 0 finds to be damaged. With $LATE "1 8" process 1 takes 8
seconds longer than others to prepare data, and to compile.
"""

import contextlib
import ctypes
import os
import signal
import time

from bigtrain import Experiment, processes, written
from bigtrain.config import config
from bigtrain.data.text import TextData
from bigtrain.run import Run
from tests import runs


@config
class Troubled(TextData):
  def make(self, seed):
    data = TextData.make(self, seed)
    kind, process, *first = os.environ.get("TROUBLE", "none 0").split()
    if first and kind != "unsaved":
      batch = data.batch

      def troubled(example, size, rows=None):
        if example >= int(first[0]) and is_process(process):
          trouble(kind)
        return batch(example, size, rows)

      data.batch = troubled
    return data


def is_process(number: str) -> bool:
  found = processes.coordination()
  return int(number) == (found[1] if found else 0)


@contextlib.contextmanager
def signalled(self, phase, *, away=Run.away, **fields):
  wanted, number, *_ = os.environ.get("TROUBLE", "none 0").split()
  late, seconds = os.environ.get("LATE", "0 0").split()
  with away(self, phase, **fields):
    if phase in ("data", "compile") and is_process(late):
      time.sleep(float(seconds))
    if phase == wanted and is_process(number):
      os.environ["TROUBLE"] = "none 0"
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(2)  # Where there are several processes, jax looks once a second.
    yield


def unsaved(place, *args, commit=written.commit):
  wanted, number, *step = os.environ.get("TROUBLE", "none 0").split()
  if wanted == "unsaved" and is_process(number) and place.name == step[0]:
    time.sleep(3)
    raise OSError("what was read back is damaged")
  return commit(place, *args)


Run.away, written.commit = signalled, unsaved


def trouble(kind: str) -> None:
  match kind:
    case "hang":
      time.sleep(1000)
    case "hold":
      ctypes.PyDLL(None).sleep(1000)  # A call by which ctypes does not let go of the lock.
    case "fail":
      raise RuntimeError("a troubled row")
    case "slow":
      time.sleep(0.5)


def base() -> Experiment:
  e = runs.base()
  fields = {name: getattr(e.data, name) for name in TextData.__dataclass_fields__}
  e.data = Troubled(**fields)
  return e
