"""Faults of one of several processes that train together."""

import random
import signal
from collections.abc import Iterator

from bigtrain.exit_codes import Exit
from bigtrain.watchdog import GRACE, PATIENCE
from tests import runs
from tools.faults.bench import LIMIT, STEPS, Bench, finish, gone_on, start, steps_of
from tools.faults.result import Result
from tools.faults.whole import Fault

PROCESSES = 4
STEP, SILENCE = 20, 30  # Seconds, of which a busy machine takes some for nothing.
LIMITS = ("--deadlines.step", str(STEP), "--deadlines.silence", str(SILENCE))
# Besides what a limit allows: who hears of it looks every few seconds, and writes its stacks.
WITHIN = SILENCE + 2 * (PATIENCE + GRACE)


def one_of(number: signal.Signals, *, first: bool = False) -> Fault:
  """A signal to one process: to the first, which is the coordinator, or to another."""
  kind = number.name.lower().removeprefix("sig")
  name = f"coordinator-{kind}" if first else f"one-of-{PROCESSES}-{kind}"
  leaves = number in (signal.SIGTERM, signal.SIGINT)

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    rng = random.Random(seed)
    for i in range(times):
      path = bench.new()
      which = 0 if first else rng.randrange(1, PROCESSES)
      at = rng.randrange(1, 50)
      all_of = start(path, *STEPS, *LIMITS, processes=PROCESSES)
      try:
        runs.wait_until(all_of[0], lambda path=path, at=at: steps_of(path) >= at)
        step = steps_of(path)
        all_of[which].send_signal(number)
        others = [p for n, p in enumerate(all_of) if n != which or leaves]
        ended = finish(others, LIMIT if leaves else WITHIN)
      finally:
        for process in all_of:
          process.kill()
          process.communicate()
      codes = ended.codes
      promised = set(codes) <= ({Exit.LEFT} if leaves else {Exit.DEADLINE, Exit.FAILED})
      promised |= set(codes) == {Exit.DONE}  # It came too late.
      # jax ends those who have lost the coordinator by a signal.
      promised |= first and all(c in (Exit.DEADLINE, -signal.SIGABRT) for c in codes)
      yield gone_on(
        bench, path, fault=name, seed=seed + i,
        happened=f"process {which} at step {step}: codes {codes} after {ended.seconds:.1f} s",
        as_promised=promised, processes=PROCESSES,
      )  # fmt: skip

  return fault
