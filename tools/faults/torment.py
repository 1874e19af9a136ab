"""The torment: a supervised run with a random fault for every so many seconds of stepping.

    python -m tools.faults.torment --seconds-between 30 --faults 30

The same run is left in peace beside it, and in the end both must have the same rows.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bigtrain.exit_codes import Exit
from bigtrain.lines import read_events
from tests import runs
from tools.faults import shim
from tools.faults.damage import flip, pick
from tools.faults.result import Result, compared
from tools.faults.shim import Control, Kind

FILE = "tools/faults/tormented.py"
SILENCE = 30  # Seconds.
LIMIT = SILENCE + 170.0  # Seconds from a fault until steps go on: a compilation on a busy machine.
SUPERVISED = ("--supervise", "--restarts.wait", "0.5", "--restarts.silence", str(SILENCE))
# A clock that goes back stops tensorstore's threads from being started, for as long as it went.
WITHIN = ("--checkpoints.within", "45")


class Tormented:
  """The supervised run, its processes and its records."""

  def __init__(self, folder: Path, arguments: list[str], rng: random.Random):
    self.path, self.arguments, self.rng = folder / "run", arguments, rng
    self.control = Control(folder / "control")
    self.log = (folder / "run.log").open("a")
    self.start()

  def start(self) -> None:
    self.process = start(
      self.path, *SUPERVISED, *self.arguments,
      log=self.log, **shim.environment(self.path, control=self.control),
    )  # fmt: skip

  def step(self) -> int:
    """The last that was recorded."""
    return last_step(self.path)

  def events(self, name: str) -> list[dict]:
    return [e for e in read_events(self.path / "events.jsonl") if e["event"] == name]

  def child(self) -> int:
    """The process that trains, as soon as there is one."""
    while self.process.poll() is None:
      with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
        if found := file.read().split():
          return int(found[0])
      time.sleep(0.05)
    raise RuntimeError(f"the supervisor ended with code {self.process.returncode}")

  def kill(self) -> None:
    """The supervisor, of which the child dies too."""
    child = self.child()
    self.process.kill()
    self.process.wait()
    while os.path.exists(f"/proc/{child}"):
      time.sleep(0.02)


def start(path: Path, *arguments: str, log, **environment: str) -> subprocess.Popen:
  command = [sys.executable, "-m", "bigtrain.cli", "train", FILE, "--dir", str(path)]
  environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | environment
  return subprocess.Popen(
    [*command, "--quiet", *arguments],
    cwd=runs.ROOT, env=os.environ | environment, stdout=log, stderr=log,
  )  # fmt: skip


def last_step(path: Path) -> int:
  with contextlib.suppress(OSError), (path / "metrics.jsonl").open("rb") as file:
    file.seek(max(file.seek(0, os.SEEK_END) - 2**17, 0))
    for line in reversed(file.read().split(b"\n")[1:-1]):
      if b'"kind": "train"' in line:
        return int(line.partition(b'"step": ')[2].partition(b",")[0])
  return 0


# The faults. Each tells what it did; `t.process` is started again by whoever ended it.


def kill_child(t: Tormented) -> str:
  os.kill(t.child(), signal.SIGKILL)
  return "the run was killed"


def kill_supervisor(t: Tormented) -> str:
  t.kill()
  t.start()
  return "the supervisor was killed, and started again"


def stop_child(t: Tormented) -> str:
  os.kill(t.child(), signal.SIGSTOP)
  return "the run was stopped until its supervisor ended it"


def terminate(t: Tormented) -> str:
  t.process.send_signal(signal.SIGTERM)
  code = t.process.wait(LIMIT)
  t.start()
  return f"SIGTERM to the supervisor, which ended with code {code}"


def terminate_child(t: Tormented) -> str:
  os.kill(t.child(), signal.SIGTERM)
  return "SIGTERM to the run alone"


def fail_disk(t: Tormented, kind: Kind) -> str:
  seconds, before = t.rng.uniform(0.5, 6), t.process
  t.control.kind(kind)
  time.sleep(seconds)
  t.control.kind(Kind.NONE)
  return f"{kind.name.lower()} disk for {seconds:.1f} s{'' if before.poll() is None else ', ended'}"


def full_disk(t: Tormented) -> str:
  return fail_disk(t, Kind.FULL)


def broken_disk(t: Tormented) -> str:
  return fail_disk(t, Kind.BROKEN)


def flip_bit(t: Tormented) -> str:
  """In an array of the newest checkpoint, while nothing runs."""
  t.kill()
  step = max(int(p.name) for p in (t.path / "checkpoints").iterdir() if p.name.isdecimal())
  place = t.path / "checkpoints" / str(step)
  file = pick(sorted([*place.glob("d/*"), *place.glob("ocdbt.process_0/d/*")]), t.rng)
  at = flip(file, t.rng)
  t.start()
  return f"killed, and bit {at} of {file.relative_to(t.path)} flipped"


def jump(t: Tormented) -> str:
  seconds = t.rng.choice([-1, 1]) * t.rng.choice([60, 3600, 86400])
  t.control.jump(seconds)
  return f"the wall clock went to {seconds:+} s"


FAULTS = {
  "kill": kill_child,
  "kill-supervisor": kill_supervisor,
  "stop": stop_child,
  "terminate": terminate,
  "terminate-child": terminate_child,
  "full-disk": full_disk,
  "broken-disk": broken_disk,
  "bit": flip_bit,
  "clock": jump,
}
MAY_NOT_END = ("clock", "full-disk", "broken-disk")  # The run goes on, or is started again.


def one(t: Tormented, name: str, seed: int) -> Result:
  """Does it, and waits until steps go on beyond those that were there."""
  step = t.step()
  verified = max((e["step"] for e in t.events("verified") if e["step"] <= step), default=0)
  t.log.write(f"== {name} at step {step}\n")
  t.log.flush()
  began, ended = time.monotonic(), ""
  resumes, damaged = len(t.events("resume")), len(t.events("damaged"))
  happened = FAULTS[name](t)
  goes_on = lambda: len(t.events("resume")) > resumes or name in MAY_NOT_END
  while t.step() <= step or not goes_on():
    if (code := t.process.poll()) == Exit.DONE:
      break
    if code is not None and not ended:
      ended = f"; the supervisor ended with code {code}"
      t.start()
    if (seconds := time.monotonic() - began) > LIMIT:
      return Result(f"torment-{name}", seed, f"{happened}; no step in {seconds:.0f} s", False)
    time.sleep(0.1)
  recovery = time.monotonic() - began
  resumed = [e["step"] for e in t.events("resume")][resumes:]
  restored = min(resumed[-1] if resumed else step, step)
  lost = 0
  if len(t.events("damaged")) == damaged:
    lost = max(verified - restored, 0)
    happened += "; it lies in nothing that is read" if name == "bit" else ""
  return Result(
    f"torment-{name}", seed, f"at step {step}: {happened}{ended}", not lost and not ended,
    recovery=round(recovery, 1), lost=lost, again=step - restored,
  )  # fmt: skip


def step_seconds(folder: Path) -> float:
  """Of the undisturbed run."""
  with (folder / "measured.log").open("w") as log:
    start(folder / "measured", "--steps", "300", log=log).wait(600)
  rows = [r for r in runs.read(folder / "measured", "metrics.jsonl") if r["kind"] == "train"]
  return statistics.median(row["step_seconds"] for row in rows[5:])


def torment(folder: Path, between: float, faults: int, seed: int) -> Iterator[Result]:
  """A result for each fault, and one for the run as a whole."""
  rng, step = random.Random(seed), step_seconds(folder)
  each = max(round(between / step / 10) * 10, 50)  # Steps.
  steps, saves = each * (faults + 1), max(each // 60 * 10, 10)
  arguments = ["--steps", str(steps), "--checkpoints.every", str(saves), *WITHIN]
  names = [name for _ in range(-(-faults // len(FAULTS))) for name in FAULTS][:faults]
  rng.shuffle(names)
  with (folder / "quiet.log").open("w") as log:
    quiet = start(folder / "quiet", *arguments, log=log)
  began, t = time.monotonic(), Tormented(folder, arguments, rng)
  try:
    for i, name in enumerate(names):
      at = (i + 1) * each + rng.randrange(-each // 3, each // 3)
      while t.step() < at:
        if (code := t.process.poll()) is not None:
          yield Result("torment", seed, f"ended by itself with code {code} at {t.step()}", False)
          return
        time.sleep(0.1)
      yield one(t, name, seed=i)
    code = t.process.wait(each * step * 20 + LIMIT)
    seconds = time.monotonic() - began
    quiet.wait(seconds)
  finally:
    for process in (quiet, t.process):
      process.terminate()
  wrong = compared(runs.values(t.path), runs.values(folder / "quiet"))
  account = t.events("goodput")[-1]
  yield Result(
    "torment", seed,
    f"{faults} faults in {steps} steps of {1e3 * step:.0f} ms, one for every {each * step:.0f} s; "
    f"ended with code {code} after {seconds:.0f} s, {len(t.events('start'))} starts, goodput "
    f"{account['goodput']}",
    kept=code == Exit.DONE and not any(wrong.values()), **wrong,
  )  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seconds-between", type=float, default=30.0)
  parser.add_argument("--faults", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--dir", type=Path, help="of both runs; a new one if it is not given")
  parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
  flags = parser.parse_args()
  folder = flags.dir or Path(tempfile.mkdtemp(prefix="torment-"))
  folder.mkdir(parents=True, exist_ok=True)
  runs.prepare(folder)
  for result in torment(folder, flags.seconds_between, flags.faults, flags.seed):
    print(result, flush=True)
    result.append(flags.results)
  print(f"bigtrain report {folder / 'run'}")


if __name__ == "__main__":
  main()
