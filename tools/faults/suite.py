"""The faults: how each is made, how often, and what is promised of it."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import runs
from tools.faults import damaged, inputs, numbers, together, whole
from tools.faults.bench import Bench
from tools.faults.damage import flip, truncate
from tools.faults.result import Result
from tools.faults.shim import Kind
from tools.faults.whole import Fault


class Row(NamedTuple):
  """A kind of fault: a row of the table."""

  fault: Fault
  times: int  # In the whole suite; of the save path, each so many-th call.
  short: int  # In the short one; 0 where it has none.
  promised: str


def saving(kind: Kind) -> Fault:
  """The save path alone, in a process of its own: it is preloaded with the faults, and forks."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    command = [sys.executable, "-m", "tools.faults.saving", kind.name, str(times), str(seed)]
    with tempfile.TemporaryDirectory() as folder:
      process = subprocess.Popen(
        [*command, folder], cwd=runs.ROOT, stdout=subprocess.PIPE, text=True
      )
      assert process.stdout is not None
      for line in process.stdout:
        yield Result(**json.loads(line))
      if process.wait():
        raise RuntimeError(f"tools.faults.saving ended with code {process.returncode}")

  return fault


GOES_ON = "goes on from the newest verified checkpoint to the same rows"
SAVED = "all leave with code 3, saved at one step; goes on to the same rows"
ENDED = "all others end in the limit, and tell who is missing; goes on to the same rows"
WHOLE = "the newest verified checkpoint is restored, to the bit; nothing damaged counts as saved"
SAID = "ends with code 1 and the reason; goes on to the same rows"
NOT_APPLIED = "that update alone is not applied; an incident is recorded; the same each time"

SUITE = {
  "save-kill": Row(saving(Kind.KILL), 1, 16, WHOLE),
  "save-torn": Row(saving(Kind.TORN), 1, 16, WHOLE),
  "save-full": Row(saving(Kind.FULL), 3, 40, f"{WHOLE}; the save is said to have failed"),
  "save-broken": Row(saving(Kind.BROKEN), 3, 0, f"{WHOLE}; the save is said to have failed"),
  "save-read_only": Row(saving(Kind.READ_ONLY), 3, 0, f"{WHOLE}; the save is said to have failed"),
  "save-slow": Row(saving(Kind.SLOW), 20, 0, WHOLE),
  "kill": Row(whole.signalled(signal.SIGKILL), 30, 1, GOES_ON),
  "term": Row(whole.signalled(signal.SIGTERM), 8, 1, SAVED),
  "int": Row(whole.signalled(signal.SIGINT), 8, 0, SAVED),
  "disk-full": Row(whole.disk(Kind.FULL), 8, 1, SAID),
  "disk-broken": Row(whole.disk(Kind.BROKEN), 8, 0, SAID),
  "disk-read-only": Row(whole.disk(Kind.READ_ONLY), 8, 0, SAID),
  "disk-slow": Row(whole.disk(Kind.SLOW), 3, 0, "trains on, to the same rows"),
  "clock-forward": Row(whole.clock(1), 4, 0, "trains on, to the same rows"),
  "clock-back": Row(whole.clock(-1), 4, 1, "trains on, to the same rows"),
  "two-jobs": Row(whole.two_jobs, 4, 1, "the second is refused, the first trains on"),
  "one-of-4-term": Row(together.one_of(signal.SIGTERM), 3, 0, SAVED),
  "one-of-4-int": Row(together.one_of(signal.SIGINT), 3, 0, SAVED),
  "one-of-4-stop": Row(together.one_of(signal.SIGSTOP), 3, 0, ENDED),
  "one-of-4-kill": Row(together.one_of(signal.SIGKILL), 3, 0, ENDED),
  "coordinator-kill": Row(together.one_of(signal.SIGKILL, first=True), 3, 0, ENDED),
  "coordinator-stop": Row(together.one_of(signal.SIGSTOP, first=True), 2, 0, ENDED),
  "checkpoint-bit": Row(
    damaged.of_checkpoint(flip), 60, 8,
    "it is set aside for the one before, or refused with the reason; goes on to the same rows",
  ),
  "checkpoint-truncated": Row(
    damaged.of_checkpoint(truncate), 40, 4,
    "it is set aside for the one before, or refused with the reason; goes on to the same rows",
  ),
  "data-bit": Row(
    damaged.of_source("bit", flip), 10, 1, "refused; goes on when the file is put back"
  ),
  "data-truncated": Row(
    damaged.of_source("truncated", truncate), 10, 1, "refused; goes on when the file is put back"
  ),
  "data-deleted": Row(
    damaged.of_source("deleted", lambda path, rng: path.unlink()), 6, 1,
    "refused; goes on when the file is put back",
  ),
  "cache-bit": Row(damaged.of_cache(flip), 30, 3, "it is made again, to the same rows"),
  "cache-truncated": Row(damaged.of_cache(truncate), 20, 2, "it is made again, to the same rows"),
  "reading-thread": Row(damaged.reading_thread, 4, 0, SAID),
  **{kind: Row(numbers.wrong(kind), 3, int(kind == "nan-data"), NOT_APPLIED)
     for kind in numbers.KINDS},
  "device-output": Row(
    numbers.device, 3, 0, "the device is named, and the run ends with code 4 before it saves that"
  ),
  "malformed-input": Row(
    inputs.malformed, 10_000, 330,
    "refused, or what is wrong is told and the rest read; nothing hangs, no code is run",
  ),
}  # fmt: skip


def results(name: str, folder: Path, times: int, seed: int) -> Iterator[Result]:
  """Of one kind of fault."""
  yield from SUITE[name].fault(Bench(folder), times, seed)
