"""The save path alone: killed at every call that changes a file, and with disks that fail.

A trial is a process that opens the checkpoints, restores the newest, and saves twice; it is killed,
or its disk fails, at one of its calls. The next trial begins where that ended: what it restores has
to be what was saved for that step, and no older than what was told to be verified.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.faults import shim
from tools.faults.result import Result
from tools.faults.shim import Kind

SAVES = 2  # Of a trial.
LIMIT = 120.0  # Seconds after which a trial hangs.


def tree(step: int) -> dict[str, np.ndarray]:
  """What is saved of a step."""
  rng = np.random.default_rng(step)
  return {"step": np.int32(step), "w": rng.normal(size=(64, 96)).astype(np.float32)}


def trial(folder: Path, kind: Kind, at: int, out: int) -> None:
  """Of one process: writes lines to `out` about what it found and did."""
  import jax

  from bigtrain.checkpoint import SaveFailed, Store
  from bigtrain.config import Refused
  from bigtrain.experiment import Checkpoints
  from bigtrain.run_directory import RunDirectory
  from tests import toys

  tell = lambda *words: os.write(out, (" ".join(map(str, words)) + "\n").encode())
  shim.arm(folder, kind, at)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
  try:
    store = Store(RunDirectory(folder).checkpoints, Checkpoints(keep=2))
    started = time.perf_counter()
    found = store.newest(like, lambda step, why: tell("damaged", step))
    step = 0 if found is None else found[0]
    if found is not None and any(
      not np.array_equal(value, tree(step)[name]) for name, value in found[1].items()
    ):
      tell("wrong", step)
    tell("restored", step, f"{time.perf_counter() - started:.3f}")
    for new in range(step + 1, step + 1 + SAVES):
      store.save(new, tree(new), toys.experiment())
      store.wait()
      tell("verified", new)
    store.wait()
    tell("calls", shim.seen())
  except SaveFailed:
    tell("failed")
  except (OSError, Refused) as error:
    tell("refused", str(error)[:200])


def run(folder: Path, kind: Kind, at: int) -> tuple[list[list[str]], str]:
  """The lines of a trial, and how it ended."""
  reader, writer = os.pipe()
  if not (child := os.fork()):
    os.close(reader)
    code = 1
    try:
      trial(folder, kind, at, writer)
      code = 0
    finally:
      os._exit(code)
  os.close(writer)
  started = time.monotonic()
  while not (ended := os.waitpid(child, os.WNOHANG))[0]:
    if time.monotonic() - started > LIMIT:
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      return [], "hung"
    time.sleep(0.005)
  with os.fdopen(reader) as lines:
    said = [line.split() for line in lines]
  killed = os.WIFSIGNALED(ended[1])
  return said, "killed" if killed else f"exit {os.waitstatus_to_exitcode(ended[1])}"


def results(folder: Path, kinds: list[Kind], every: int, seed: int) -> Iterator[Result]:
  """A result for each call of each kind; every so many calls."""
  folder.mkdir(parents=True, exist_ok=True)
  quiet, _ = run(folder, Kind.NONE, 1)
  quiet, _ = run(folder, Kind.NONE, 1)  # With something to restore and to remove.
  told = dict((line[0], line[1]) for line in quiet)
  calls, verified = int(told["calls"]), int(told["verified"])
  for kind in kinds:
    for at in range(1 + seed % every, calls + 2, every):
      lines, ended = run(folder, kind, at)
      last: dict[str, Any] = {line[0]: line[1:] for line in lines}
      now = max([verified, *(int(line[1]) for line in lines if line[0] == "verified")])
      # Whatever that was, the next one that is left in peace goes on.
      after, ended_after = run(folder, Kind.NONE, 1)
      found = {line[0]: line[1:] for line in after}
      restored, seconds = int(found["restored"][0]), float(found["restored"][1])
      kept = "wrong" not in last and "wrong" not in found and ended != "hung"
      kept &= now <= restored <= now + SAVES and ended_after == "exit 0" and "damaged" not in found
      yield Result(
        fault=f"save-{kind.name.lower()}",
        seed=at,
        happened=f"call {at} of {calls}: {ended}{', failed' * ('failed' in last)}",
        kept=bool(kept),
        recovery=seconds,
        lost=max(now - restored, 0),
      )
      verified = max(now, *(int(line[1]) for line in after if line[0] == "verified"))


def main() -> None:
  """KIND EVERY SEED FOLDER: a line of JSON for each result."""
  shim.preload()
  os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
  # Before the forks, which would each import them.
  import orbax.checkpoint  # noqa: F401

  import bigtrain.checkpoint  # noqa: F401

  kind, every, seed, folder = sys.argv[1:]
  for result in results(Path(folder) / "run", [Kind[kind]], int(every), int(seed)):
    print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
  main()
