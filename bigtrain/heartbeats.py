"""Heartbeats: each process tells process 0 what it does, and hears whether the job is to end.

They go through the key-value store of jax's coordination service, which process 0 holds: one small
message a process every few seconds, and no file system that thousands of processes would read. What
has to last (stacks, events) goes to files of the run directory instead; a process that does not
hear from the store any more knows that process 0 is the one in trouble.

How old a beat is goes by the clock of who reads it: clocks of machines differ.

A process that waits for others cannot tell work from a hang. Process 0, which knows what all do,
says whenever one is at work that its own limit allows; until then nobody has waited in vain.
"""

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bigtrain.deadlines import Deadlines, limit
from bigtrain.phases import doing

BEAT = "bigtrain/beat/"
JOB = "bigtrain/job/"  # What all processes hear.
END = f"{JOB}end"  # The first process that ends in trouble says so here.
WORK = f"{JOB}work"  # Process 0 writes something new here as long as a process is at work.
GONE = "bigtrain/gone/"
ALL = "all"
WAITING = ("step", "agree")  # Phases in which a process waits for the others.
MAY_WAIT = (*WAITING, "loop")  # Parts look at what a step gave.
OVER = "end"  # The phase of one that is done.
LEAST = 0.02  # Seconds at each step that are worth a word.


class Beat(NamedTuple):
  """What one process last told, and what is known of it by that."""

  phase: str
  step: int
  busy: float  # Seconds since it last got on with its phase, then.
  own: float = 0.0  # Seconds of all its steps that were its own work.
  silent: float = 0.0  # Seconds since that was heard.

  def __str__(self) -> str:
    """Such as "step 7, in input for 12 s, silent for 62 s"."""
    said = f"step {self.step}, in {self.phase} for {self.busy + self.silent:.0f} s"
    return said + f", silent for {self.silent:.0f} s" * (self.silent >= 1)


class Ending(NamedTuple):
  """Why the job is to end."""

  process: int
  code: int
  text: str

  def __str__(self) -> str:
    return f"process {self.process} ended: {self.text}"


class Straggler(NamedTuple):
  process: int
  seconds: float  # What it keeps the others waiting: so far, or at each step.
  why: str


def missing(beats: Mapping[int, Beat], silence: float) -> list[int]:
  """The processes that the others wait for: silent ones, else those that do something else."""
  if silent := [p for p, beat in beats.items() if beat.silent > silence]:
    return silent
  furthest = max((beat.step for beat in beats.values()), default=0)
  # A step is counted when it was handed to the devices, so those who wait for one differ by one.
  near = {p for p, beat in beats.items() if beat.step >= furthest - 1}
  waiting = [p for p in near if beats[p].phase in WAITING]
  at_work = [p for p, beat in beats.items() if beat.phase not in (*WAITING, OVER)]
  return sorted({*at_work, *(beats.keys() - near)}) if waiting else []


def latecomers(beats: Mapping[int, Beat], patience: float) -> Iterator[Straggler]:
  """Those for which most others have waited longer than `patience`, in seconds."""
  since = {p: beat.busy + beat.silent for p, beat in beats.items()}
  waited = sorted(since[p] for p, beat in beats.items() if beat.phase in WAITING)
  if 2 * len(waited) >= len(beats) and waited[0] > patience:
    for p in missing(beats, patience):
      if since[p] > patience:
        yield Straggler(p, waited[0], str(beats[p]))


def stragglers(
  before: Mapping[int, Beat], after: Mapping[int, Beat], step_seconds: float
) -> Iterator[Straggler]:
  """Those whose own work costs every step a fifth of itself more than that of most.

  A step is over for all processes together, so its time is that of the slowest and names nobody;
  what a process does beside waiting for devices is its own.
  """
  own = {}
  for p, beat in after.items():
    if p in before and (steps := beat.step - before[p].step) > 0:
      own[p] = (beat.own - before[p].own) / steps
  usual = statistics.median_low(own.values()) if own else 0.0
  for p, seconds in own.items():
    # What is hidden behind the step on the devices costs nothing.
    if seconds - usual > max(0.2 * step_seconds, LEAST) and seconds > 0.5 * step_seconds:
      why = f"{seconds:.3f} s of its own at each step, others {usual:.3f} s"
      yield Straggler(p, seconds - usual, why)


class Heart(threading.Thread):
  """Tells and hears, in a thread of its own: whoever calls a process that is stopped waits.

  Args:
    client: of jax's coordination service.
    process, processes: which this is, from 0, and of how many.
    deadlines: of the phases of all.
  """

  def __init__(self, client: Any, process: int, processes: int, deadlines: Deadlines):
    super().__init__(name="heartbeats", daemon=True)
    self.client, self.process, self.processes = client, process, processes
    self.deadlines = deadlines
    # Seconds between beats: few, by any limit of who waits, as a word about others takes three.
    waits = [most / 4 for most in (deadlines.step, deadlines.agree) if most]
    self.every = min([5.0, (deadlines.silence or 80.0) / 8, *waits])
    self.heard = time.monotonic()  # When the store last answered.
    self.at_work = self.heard  # When a process that others may wait for last was.
    self._work = ""  # What the store had of that.
    self.ending: Ending | None = None
    self._seen: dict[int, tuple[str, float]] = dict.fromkeys(range(processes), ("", self.heard))
    self._stopped = threading.Event()
    self._number = 0

  def run(self) -> None:
    while True:
      # The store says what goes wrong by errors of its own: then it has not been heard.
      with contextlib.suppress(Exception):
        self._beat()
      if self._stopped.wait(self.every):
        return

  @property
  def soon(self) -> float:
    """Seconds in which who is there has been heard of."""
    return 3 * self.every + 1

  def hears(self) -> bool:
    """Whether the store, and with it process 0, answers."""
    return time.monotonic() - self.heard < self.soon

  def stop(self) -> None:
    self._stopped.set()

  def _beat(self) -> None:
    self._number += 1
    now = time.monotonic()
    told = (self._number, doing.name, doing.step, now - doing.since, doing.own_seconds())
    self.client.key_value_set(f"{BEAT}{self.process}", json.dumps(told), allow_overwrite=True)
    found = dict(self.client.key_value_dir_get(JOB))
    self.heard = time.monotonic()
    if END in found and self.ending is None:
      self.ending = Ending(*json.loads(found[END]))
    if (work := found.get(WORK, "")) != self._work:
      self.at_work, self._work = self.heard, work
    if self.process == 0:
      for key, value in self.client.key_value_dir_get(BEAT):
        p = int(key.rpartition("/")[2])
        if self._seen[p][0] != value:
          self._seen[p] = value, self.heard
      if any(map(self._is_at_work, self.beats().values())):
        self.at_work, self._work = self.heard, str(self._number)
        self.client.key_value_set(WORK, self._work, allow_overwrite=True)

  def _is_at_work(self, beat: Beat) -> bool:
    """Whether this process waits for nobody, is heard of, and has not taken too long."""
    most, seconds = limit(self.deadlines, beat.phase, 0.0), beat.busy + beat.silent
    heard = beat.silent < self.soon and (not most or seconds < most)
    return heard and beat.phase not in (*MAY_WAIT, OVER)

  def beats(self) -> dict[int, Beat]:
    """What every process last told; on process 0 alone."""
    now, found = time.monotonic(), {}
    for p, (value, at) in self._seen.items():
      beat = Beat(*json.loads(value)[1:]) if value else Beat("start", 0, 0.0)
      found[p] = beat._replace(silent=now - at)
    return found

  def announce(self, ending: Ending) -> Ending:
    """Tells all that the job is to end; returns what is believed, which is who said so first."""
    with contextlib.suppress(Exception):  # Another one did, or the store is gone.
      self.client.key_value_set(END, json.dumps(ending))
    with contextlib.suppress(Exception):
      ending = Ending(*json.loads(dict(self.client.key_value_dir_get(JOB))[END]))
    return ending

  def goodbye(self, patience: float) -> None:
    """Before a process ends in trouble: waits until all others are as far, in seconds at most.

    Whoever ends earlier breaks connections, at which others fail before they could write what they
    did; and with process 0 the store goes, at which jax ends them by a signal.
    """
    until = time.monotonic() + patience
    with contextlib.suppress(Exception):
      self.client.key_value_set(f"{GONE}{self.process}", "", allow_overwrite=True)
      while time.monotonic() < until and not self._all_there():
        time.sleep(0.1)
    if self.process == 0:
      time.sleep(0.5)  # The others look, and are gone.

  def _all_there(self) -> bool:
    """Whether all have said goodbye but those who are silent, of whom process 0 knows."""
    found = {key.rpartition("/")[2] for key, _ in self.client.key_value_dir_get(GONE)}
    if self.process == 0:
      silent = {p for p, beat in self.beats().items() if beat.silent > self.soon}
      if len(silent | {int(p) for p in found if p != ALL}) == self.processes:
        self.client.key_value_set(f"{GONE}{ALL}", "", allow_overwrite=True)
        return True
    return ALL in found
