"""Phases: what this process is doing, by name, for whoever watches it (watchdog.py).

The main thread says what it does; others read. Saying it costs a microsecond, and nothing here
waits, writes or imports jax, so that any room may.
"""

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator

MEDIAN_OF = 101  # Steps.
STEPPING = ("loop", "input", "step")  # What a step is made of; the others are away from it.


class Late(Exception):
  """Something took longer than its limit; exit code 5."""


class Doing:
  """What the main thread does. Seconds are of a clock that only goes forward."""

  def __init__(self):
    self.name = "start"
    self.since = time.monotonic()  # When that began, or last got on.
    self.first: int | None = None  # The step that this start goes on from, when it is known.
    self.step = 0  # Completed ones.
    self.stepped = self.since  # When the last one was.
    self.seconds: dict[str, float] = collections.defaultdict(float)  # By phase, inner ones apart.
    self.steps: collections.deque[float] = collections.deque(maxlen=MEDIAN_OF)  # Seconds of each.
    self._before = 0.0  # What all steps had taken.

  def median(self) -> float:
    """Seconds that a step takes, of the last ones; 0 before there are any."""
    return statistics.median(list(self.steps) or [0.0])

  def own_seconds(self) -> float:
    """Seconds of steps that were this process's own work, and no waiting for devices."""
    return self.seconds["loop"] + self.seconds["input"]

  def count(self, step: int) -> None:
    now = sum(self.seconds[name] for name in STEPPING)
    if self.first is None:
      self.first = step
    elif step > self.first + 1:  # At the first one processes wait for who compiled longest.
      self.steps.append(now - self._before)
    self._before, self.step, self.stepped = now, step, self.since


doing = Doing()


def enter(name: str) -> str:
  """From now on this process does that; returns what it did."""
  before = doing.name
  if threading.current_thread() is threading.main_thread():
    now = time.monotonic()
    doing.seconds[before] += now - doing.since
    doing.name, doing.since = name, now
  return before


@contextlib.contextmanager
def within(name: str) -> Iterator[None]:
  """Inside, this process does that; then again what it did before."""
  before = enter(name)
  try:
    yield
  finally:
    enter(before)


def got_on() -> None:
  """It does the same still, but has got on with it: its time begins anew."""
  enter(doing.name)


def stepped(step: int) -> None:
  """So many steps are done. The first call of a start says where it goes on from."""
  got_on()
  doing.count(step)
