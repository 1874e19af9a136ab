"""What faults of whole runs are made with: a folder, a run left in peace, how both are compared.

`prepared` in tests/runs.py fills a folder with a text; $RUNS_TEXT and $BIGTRAIN_CACHE name it.
"""

import contextlib
import functools
import os
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bigtrain.exit_codes import Exit
from bigtrain.lines import read_events, read_rows
from tests import runs
from tools.faults.result import Result, compared

LIMIT = 300.0  # Seconds after which a command hangs.
STEPS = ("--steps", "60")


class Ended(NamedTuple):
  """How a command ended."""

  codes: list[int]  # By process; what a signal killed has a negative one.
  errors: list[str]  # What they wrote on standard error.
  seconds: float  # Since it was waited for.


class Bench:
  """Where a suite runs: a folder of its own, and the rows of a run that nothing happened to."""

  def __init__(self, folder: Path):
    self.folder, self._number = folder, 0
    self._quiet: dict[tuple, Path] = {}

  def new(self) -> Path:
    """A path for another run."""
    self._number += 1
    return self.folder / f"run-{self._number}"

  def quiet(self, processes: int = 1, file: str = "tests/runs.py", steps=STEPS) -> Path:
    """A run that nothing happens to."""
    if (kind := (processes, file, steps)) not in self._quiet:
      path = self.new()
      ended = finish(start(path, *steps, file=file, processes=processes))
      if set(ended.codes) != {Exit.DONE}:
        raise RuntimeError(ended.errors)
      self._quiet[kind] = path
    return self._quiet[kind]

  @functools.cached_property
  def whole_seconds(self) -> float:
    """How long a run takes that nothing happens to."""
    self.quiet()
    began = time.monotonic()
    finish(start(self.new(), *STEPS))
    return time.monotonic() - began


@contextlib.contextmanager
def cache_at(path: Path) -> Iterator[None]:
  """Inside, tokenised data are kept there."""
  before = os.environ["BIGTRAIN_CACHE"]
  os.environ["BIGTRAIN_CACHE"] = str(path)
  try:
    yield
  finally:
    os.environ["BIGTRAIN_CACHE"] = before


def start(
  path: Path, *arguments: str, file: str = "tests/runs.py", processes: int = 1, **environment: str
) -> list[subprocess.Popen]:
  """`bigtrain train` in so many processes, of eight devices together if they are several."""
  each = runs.joined(processes) if processes > 1 else [{}]
  return [runs.start(path, *arguments, file=file, **one, **environment) for one in each]


def finish(processes: Sequence[subprocess.Popen], limit: float = LIMIT) -> Ended:
  """Waits for all; what has not ended after so long is killed, and has the code None stands for."""
  began, codes, errors = time.monotonic(), [], []
  for process in processes:
    try:
      _, error = process.communicate(timeout=max(limit - (time.monotonic() - began), 0.1))
      codes.append(process.returncode)
    except subprocess.TimeoutExpired:
      process.kill()
      _, error = process.communicate()
      codes.append(HUNG)
    errors.append(error)
  return Ended(codes, errors, time.monotonic() - began)


HUNG = 999  # Instead of an exit code.


def steps_of(path: Path) -> int:
  """The last step that was recorded."""
  rows = read_rows(path / "metrics.jsonl")
  return max((r["step"] for r in rows if r["kind"] == "train"), default=0)


def verified(path: Path) -> int:
  """The newest checkpoint that the run has told to be verified."""
  events = read_events(path / "events.jsonl")
  return max((e["step"] for e in events if e["event"] == "verified"), default=0)


def gone_on_from(path: Path, done: int) -> int:
  """The step from which the last start went on; `done` if it had nothing left to do."""
  last: list[dict] = []
  for event in read_events(path / "events.jsonl"):
    last = [] if event["event"] == "start" else [*last, event]
  begun = [e.get("step", 0) for e in last if e["event"] in ("initialise", "resume")]
  return begun[-1] if begun else done


def gone_on(
  bench: Bench,
  path: Path,
  *,
  fault: str,
  seed: int,
  happened: str,
  as_promised: bool,
  processes: int = 1,
) -> Result:
  """Starts the run again, to its end, and compares it with the one that nothing happened to.

  Args:
    fault, seed, happened: of the result.
    as_promised: whether all was, so far.
  """
  step, newest = steps_of(path), verified(path)
  began = time.monotonic()
  all_of, recovery = start(path, *STEPS, processes=processes), 0.0
  while not recovery and any(process.poll() is None for process in all_of):
    if time.monotonic() - began > LIMIT:
      break
    recovery = time.monotonic() - began if steps_of(path) > step else 0.0
    time.sleep(0.02)
  ended = finish(all_of)
  wrong = compared(runs.values(path), runs.values(bench.quiet(processes)))
  restored = min(gone_on_from(path, step), step)
  wrong["lost"] += max(newest - restored, 0) if newest < int(STEPS[1]) else 0
  done = set(ended.codes) == {Exit.DONE}
  told = "" if done else f"; then codes {ended.codes}: {ended.errors[0][-300:]}"
  return Result(
    fault, seed, happened + told, kept=as_promised and done and not any(wrong.values()),
    recovery=round(recovery or time.monotonic() - began, 1), again=step - restored, **wrong,
  )  # fmt: skip


def instants(seed: int, times: int, longest: float) -> Iterator[tuple[int, float]]:
  """Random ones, each with its number."""
  rng = random.Random(seed)
  for i in range(times):
    yield seed + i, rng.uniform(0.0, longest)
