"""Damage to what a run goes on from: its checkpoints, its data, the cache of them.

A run that left behind step 12 is copied, something of it is damaged, and it goes on in this
process: to the rows of a run that nothing happened to, or to a refusal, behind which it still can.
"""

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bigtrain.config import Refused
from bigtrain.failures import CheckFailed
from bigtrain.parts import Part
from bigtrain.train import train
from tests import runs
from tools.faults.bench import Bench, cache_at, finish, start, steps_of
from tools.faults.damage import flip, pick, truncate
from tools.faults.result import Result, compared
from tools.faults.whole import Fault

Damage = Callable[[Path, random.Random], int]
LEFT = 12  # The step.


class Leave(Part):
  def before_step(self, step: int) -> None:
    if step == LEFT - 1:
      signal.raise_signal(signal.SIGTERM)


class Broken:
  """A copy of a run and of its cache, which the environment names until it ends."""

  def __init__(self, bench: Bench):
    if not (bench.folder / "left").exists():
      train(runs.base(), bench.folder / "whole", quiet=True)
      train(runs.base(), bench.folder / "left", quiet=True, parts=[Leave()])
    self.expected = runs.values(bench.folder / "whole")
    self.run, self.cache = bench.new(), bench.new()
    shutil.copytree(bench.folder / "left", self.run)
    shutil.copytree(os.environ["BIGTRAIN_CACHE"], self.cache)
    self._named = cache_at(self.cache)

  def __enter__(self) -> "Broken":
    self._named.__enter__()
    return self

  def __exit__(self, *raised) -> None:
    self._named.__exit__(*raised)

  def result(
    self, fault: str, seed: int, happened: str, mend: Callable[[], object] = lambda: None
  ) -> Result:
    """Goes on; where that is refused, once more when `mend` has done what the message asks for."""
    began, told, kept, allow = time.monotonic(), "", True, False
    for _ in range(2):
      try:
        train(runs.base(), self.run, quiet=True, allow_changes=allow)
        break
      except (Refused, CheckFailed) as error:
        told += f"; refused: {str(error)[:160]}"
        allow = isinstance(error, CheckFailed)  # Of a first step that is said to be another.
        mend()
      except Exception as error:
        told, kept = f"{told}; {error!r:.200}", False
        break
    wrong = compared(runs.values(self.run), self.expected)
    damaged = "; set aside" * bool(runs.events(self.run, "damaged"))
    return Result(
      fault, seed, happened + damaged + told, kept=kept and not any(wrong.values()),
      recovery=round(time.monotonic() - began, 1), again=self._again(), **wrong,
    )  # fmt: skip

  def _again(self) -> int:
    resumed = runs.events(self.run, "resume")
    return LEFT - resumed[-1]["step"] if resumed else 0


def of_checkpoint(damage: Damage) -> Fault:
  """In each kind of file of the newest checkpoint."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    for i in range(times):
      rng = random.Random(seed + i)
      with Broken(bench) as broken:
        place = broken.run / f"checkpoints/{LEFT}"
        kinds: dict[str, list[Path]] = {}
        for path in sorted(place.rglob("*")):
          if path.is_file() and path.stat().st_size:
            within = path.relative_to(place)
            # Files of arrays have names of their own each time.
            kind = str(within.parent / "*" if within.parent.name == "d" else within)
            kinds.setdefault(kind, []).append(path)
        kind = sorted(kinds)[i % len(kinds)]
        at = damage(pick(kinds[kind], rng), rng)
        yield broken.result(f"checkpoint-{NAMES[damage]}", seed + i, f"{kind} at {at}")

  return fault


NAMES: dict[Damage, str] = {flip: "bit", truncate: "truncated"}


def of_source(name: str, damage: Callable[[Path, random.Random], object]) -> Fault:
  """In a file of the data. What it was is put back, as the message says."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    for i in range(times):
      rng = random.Random(seed + i)
      with Broken(bench) as broken:
        file = pick(sorted(Path(os.environ["RUNS_TEXT"]).iterdir()), rng)
        put_back = functools.partial(file.write_bytes, file.read_bytes())
        try:
          damage(file, rng)
          result = broken.result(f"data-{name}", seed + i, file.name, put_back)
        finally:
          put_back()
        result.kept &= "refused" in result.happened
        yield result

  return fault


def of_cache(damage: Damage) -> Fault:
  """In a file of the tokenised data, which is made again."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    for i in range(times):
      with Broken(bench) as broken:
        files = sorted(f for f in (broken.cache / "data").glob("*/*") if f.stat().st_size)
        file = files[i % len(files)]
        at = damage(file, random.Random(seed + i))
        yield broken.result(f"cache-{NAMES[damage]}", seed + i, f"{file.name} at {at}")

  return fault


MANY = ("--steps", "3000", "--checkpoints.every", "200", "--evaluation.every", "0")


def reading_thread(bench: Bench, times: int, seed: int) -> Iterator[Result]:
  """The file that it reads is cut off under it, so that it dies."""
  for i in range(times):
    rng, path = random.Random(seed + i), bench.new()
    expected = runs.values(bench.quiet(steps=MANY))
    shutil.copytree(os.environ["BIGTRAIN_CACHE"], cache := bench.new())
    with cache_at(cache):
      (process,) = all_of = start(path, *MANY)
      at = rng.randrange(1, 1500)
      runs.wait_until(process, lambda path=path, at=at: steps_of(path) >= at)
      tokens = next((cache / "data").glob("*/train.tokens"))
      os.truncate(tokens, rng.randrange(1000))
      began = time.monotonic()
      ended = finish(all_of, 120)
      seconds = time.monotonic() - began
      step, again = steps_of(path), finish(start(path, *MANY))
      wrong = compared(runs.values(path), expected)
      (code,), (error,) = ended.codes, ended.errors
      resumed = [e["step"] for e in runs.events(path, "resume")]
      yield Result(
        "reading-thread", seed + i,
        f"at step {at}: code {code} after {seconds:.1f} s, {error.strip()[-120:]}",
        kept=code == 1 and again.codes == [0] and not any(wrong.values()),
        recovery=round(again.seconds, 1), again=step - resumed[-1] if resumed else 0, **wrong,
      )  # fmt: skip
