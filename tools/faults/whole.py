"""Faults of a whole run of one process: signals, a disk that fails, a clock that jumps, a twin."""

import random
import signal
import time
from collections.abc import Callable, Iterator

from bigtrain.exit_codes import Exit
from tests import runs
from tools.faults import shim
from tools.faults.bench import HUNG, STEPS, Bench, finish, gone_on, instants, start, steps_of
from tools.faults.result import Result, compared
from tools.faults.shim import Kind

Fault = Callable[[Bench, int, int], Iterator[Result]]  # The bench, how many times, the seed.


def signalled(number: signal.Signals) -> Fault:
  """At a random instant from the start to the end of a run."""
  name = number.name.lower().removeprefix("sig")

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    for seed_, after in instants(seed, times, bench.whole_seconds):
      path = bench.new()
      (process,) = start(path, *STEPS)
      time.sleep(after)
      process.send_signal(number)
      ended = finish([process])
      (code,) = ended.codes
      codes = {signal.SIGKILL: (-signal.SIGKILL,)}.get(number, (Exit.LEFT, -number))
      happened = f"after {after:.2f} s, at step {steps_of(path)}: code {code}"
      yield gone_on(
        bench, path, fault=name, seed=seed_, happened=happened,
        as_promised=code in (*codes, Exit.DONE),
      )  # fmt: skip

  return fault


def disk(kind: Kind) -> Fault:
  """From a random call on that changes a file of the run."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    rng = random.Random(seed)
    for i in range(times):
      path, first = bench.new(), rng.randrange(1, CALLS)
      last = first + 20 if kind is Kind.SLOW else 0  # Four seconds in all.
      ended = finish(start(path, *STEPS, **shim.environment(path, kind, first, last)))
      (code,), (error,) = ended.codes, ended.errors
      # What cannot be recorded may not hinder the training, if it is only the last word.
      promised = (Exit.DONE,) if kind is Kind.SLOW else (Exit.FAILED, Exit.REFUSED, Exit.DONE)
      said = error.strip().splitlines()[-1][-200:] if error.strip() else "nothing said"
      yield gone_on(
        bench, path, fault=f"disk-{kind.name.lower().replace('_', '-')}", seed=seed + i,
        happened=f"from call {first}, at step {steps_of(path)}: code {code}, {said}",
        as_promised=code in promised and "Traceback" not in error,
      )  # fmt: skip

  return fault


CALLS = 700  # Of a run of that many steps, about, by `shim.seen`.


def clock(sign: int) -> Fault:
  """The wall clock jumps while the run trains."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    rng = random.Random(seed)
    for i in range(times):
      jump, after = sign * rng.choice([30, 3600, 86400 * 40]), rng.uniform(1, bench.whole_seconds)
      path = bench.new()
      ended = finish(start(path, *STEPS, **shim.environment(clock=(jump, int(after)))))
      wrong = compared(runs.values(path), runs.values(bench.quiet()))
      (code,) = ended.codes
      yield Result(
        "clock-forward" if sign > 0 else "clock-back", seed + i,
        f"{jump:+} s after {int(after)} s: code {code}",
        kept=code == Exit.DONE and not any(wrong.values()), **wrong,
      )  # fmt: skip

  return fault


def two_jobs(bench: Bench, times: int, seed: int) -> Iterator[Result]:
  """A second start on one run directory."""
  for seed_, after in instants(seed, times, 2.0):
    path = bench.new()
    first = start(path, *STEPS)
    runs.wait_until(first[0], lambda path=path: (path / "config.json").exists())
    time.sleep(after)
    second = finish(start(path, *STEPS))
    one = finish(first)
    wrong = compared(runs.values(path), runs.values(bench.quiet()))
    # Where the first one had ended, the second finds nothing left to do.
    codes = (second.codes[0], one.codes[0])
    refused = "another process trains in" in second.errors[0]
    kept = (codes == (Exit.REFUSED, Exit.DONE) and refused) or codes == (Exit.DONE, Exit.DONE)
    yield Result(
      "two-jobs", seed_, f"the second after {after:.1f} s: codes {codes}",
      kept=kept and not any(wrong.values()) and HUNG not in codes, **wrong,
    )  # fmt: skip
