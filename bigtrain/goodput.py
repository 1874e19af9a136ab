"""Goodput: where the time of a run went, over all its starts, and how much of it was kept.

An account is a pure function of events.jsonl and metrics.jsonl. Time inside a timed event is of
that event's kind. What is left of an attempt is start-up until its first step was compiled, and
steps from then on; steps whose outcome a later start did not go on from are lost work. Between the
last sign of life of one attempt and the beginning of the next the run is idle.

Of the steps that were kept, input wait is what the host waited for batches. The devices may still
have been busy with the step before, so it is the most that the input can have cost, and compute,
the rest, is the least that was computed.
"""

import bisect
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from bigtrain.run_directory import RunDirectory

# What time goes to, in the order in which it is told.
KINDS = (
  "compute", "input wait", "compile", "checkpoint", "evaluation", "restore", "start-up",
  "lost work", "idle", "other",
)  # fmt: skip
PHASES = {
  "start": "start-up",
  "data": "start-up",
  "initialise": "start-up",
  "weights": "start-up",
  "compile": "compile",
  "restore": "restore",
  "evaluate": "evaluation",
  "sample": "evaluation",
  "save": "checkpoint",
  "hang": "idle",
}
# Their seconds are no time of the training thread: it went on meanwhile.
BESIDE = ("straggler", "verified", "resume")
OVER = ("end", "left", "error")
OUTSIDE = ("restart",)  # What a supervisor writes says nothing of how long an attempt lived.
CLOCKS = 0.002  # Seconds by which the rounded ends of two phases may overlap.

Record = dict[str, Any]


class Stretch(NamedTuple):
  """Time that went to one thing, in seconds since the epoch."""

  kind: str
  began: float
  ended: float


class Attempt(NamedTuple):
  """One start of a run, until its last sign of life."""

  began: float
  ended: float
  step: int | None  # Where it began to step; None if it did not come that far.
  outcome: str  # "end", "left", "error", or "killed", which is also what still runs looks like.


@dataclasses.dataclass(frozen=True)
class Account:
  """A run's time: stretches that follow each other without gap or overlap."""

  attempts: list[Attempt]
  stretches: list[Stretch]  # In them, input wait is still within compute.
  input_wait: float  # Seconds.

  @functools.cached_property
  def seconds(self) -> dict[str, float]:
    """Seconds by kind, all of KINDS; their sum is the wall time."""
    sums: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for kind, began, ended in self.stretches:
      sums[kind] += ended - began
    sums["input wait"] = min(self.input_wait, sums["compute"])
    sums["compute"] -= sums["input wait"]
    return sums

  @property
  def wall(self) -> float:
    """Seconds from the beginning of the first attempt to the last sign of life."""
    return sum(self.seconds.values())

  @property
  def goodput(self) -> float:
    """Compute that was kept, as a share of the wall time."""
    return self.seconds["compute"] / self.wall if self.wall else 0.0


def account(events: Sequence[Record], rows: Iterable[Record]) -> Account:
  """Where a run's time went.

  Args:
    events: all lines of events.jsonl, in order.
    rows: rows of metrics.jsonl. Their "time" tells when an attempt that was killed still lived;
      rows of an older version have none.
  """
  rows = list(rows)
  own = _by_attempt(events)
  attempts = _attempts(own, [r["time"] for r in rows if "time" in r], events)
  lost = _lost(events)
  stretches: list[Stretch] = []
  for attempt, of_it in zip(attempts, own, strict=True):
    if stretches and attempt.began > stretches[-1].ended:
      stretches.append(Stretch("idle", stretches[-1].ended, attempt.began))
    for stretch in _flat(_phases(of_it), attempt):
      stretches += _without(stretch, lost)
  waited = _waited(rows, [a.step for a in attempts if a.step is not None])
  return Account(attempts, stretches, waited)


def _by_attempt(events: Sequence[Record]) -> list[list[Record]]:
  """The events of each attempt, its "start" first."""
  own: list[list[Record]] = []
  for event in events:
    if event["event"] == "start":
      own.append([])
    if own and event["event"] not in OUTSIDE:
      own[-1].append(event)
  return own


def _attempts(
  own: list[list[Record]], times: list[float], events: Sequence[Record]
) -> list[Attempt]:
  # The rows that a start dropped were the last sign of life of an attempt before it.
  signs = sorted([*times, *(e["until"] for e in events if e.get("until") is not None)])
  starts = [of_it[0]["time"] for of_it in own]
  attempts: list[Attempt] = []
  for i, of_it in enumerate(own):
    following = starts[i + 1] if i + 1 < len(own) else float("inf")
    before = bisect.bisect_left(signs, following)
    ended = max(min(e["time"], following) for e in of_it)
    ended = max([starts[i], ended, *signs[max(before - 1, 0) : before]])
    began = starts[i] - of_it[0].get("seconds", 0.0)
    if attempts:
      began = min(max(began, attempts[-1].ended), starts[i])
    begun = [0 if e["event"] == "initialise" else e["step"] for e in of_it if _begins(e)]
    over = [e["event"] for e in of_it if e["event"] in OVER]
    attempts.append(Attempt(began, ended, begun[0] if begun else None, [*over, "killed"][0]))
  return attempts


def _begins(event: Record) -> bool:
  """Whether this event tells from which step a start, or a rollback, went on."""
  return event["event"] == "initialise" or (
    event["event"] in ("restore", "resume") and event.get("step") is not None
  )


def _phases(events: list[Record]) -> list[Stretch]:
  """What the timed events of an attempt say, and what they imply of the time without one."""
  found = []
  compiled, saved = None, None
  for event in events:
    name, ended = event["event"], event["time"]
    if "seconds" in event and name not in BESIDE:
      found.append(Stretch(PHASES.get(name, "other"), ended - event["seconds"], ended))
      saved = ended if name == "save" else None
    if name == "compile" and compiled is None:
      compiled = ended
    # Until the last one was durable; a run that was stopped at once, with a cause, saved none.
    if name in ("end", "left") and saved is not None and "cause" not in event:
      found.append(Stretch("checkpoint", saved, ended))
  began, ended = events[0]["time"], events[-1]["time"]
  return [Stretch("start-up", began, ended if compiled is None else compiled), *found]


def _flat(phases: list[Stretch], attempt: Attempt) -> Iterator[Stretch]:
  """Phases within phases as stretches one after the other; what none covers is compute."""
  open_, at = [Stretch("compute", attempt.began, attempt.ended)], attempt.began
  ahead = sorted(phases, key=lambda p: (p.began, -p.ended))
  for phase in [*ahead, Stretch("", attempt.ended, attempt.ended)]:
    began, ended = min(phase.began, attempt.ended), min(phase.ended, attempt.ended)
    # One that ends later than what it would lie within follows it: clocks drift, and are rounded.
    while len(open_) > 1 and (open_[-1].ended <= began or ended > open_[-1].ended + CLOCKS):
      last = open_.pop()
      if last.ended > at:
        yield Stretch(last.kind, at, last.ended)
        at = last.ended
    if began > at:
      yield Stretch(open_[-1].kind, at, began)
      at = began
    open_.append(phase._replace(ended=ended))


def _lost(events: Sequence[Record]) -> list[tuple[float, float]]:
  """Times between which what was trained was not gone on from: from a save to a return to it."""
  saved: dict[int, float] = {0: float("-inf")}
  lost, told = [], None  # The step of a return that the events before have told already.
  for event in events:
    name = event["event"]
    if name == "start":
      told = None
    elif name == "save" and "step" in event:
      saved[event["step"]], told = event["time"], None
    elif _begins(event) or name == "rollback":
      to = 0 if name == "initialise" else event["to" if name == "rollback" else "step"]
      if to in saved and to != told:
        lost.append((saved[to], event["time"]))
      saved = {step: when for step, when in saved.items() if step <= to}
      told = to
  return lost


def _without(stretch: Stretch, lost: list[tuple[float, float]]) -> Iterator[Stretch]:
  """The stretch, and as lost work the parts of it that were; what was no step stays what it was."""
  if stretch.kind not in ("compute", "evaluation"):
    yield stretch
    return
  edges = {edge for window in lost for edge in window if stretch.began < edge < stretch.ended}
  cuts = [stretch.began, *sorted(edges), stretch.ended]
  for began, ended in itertools.pairwise(cuts):
    within = any(first <= began and ended <= last for first, last in lost)
    yield Stretch("lost work" if within else stretch.kind, began, ended)


def _waited(rows: list[Record], starts: list[int]) -> float:
  """Seconds that kept steps waited for their batches.

  A row has the mean since the row before it. The first step of a start is not measured.
  """
  firsts, waited, before = sorted(step + 1 for step in starts), 0.0, 0
  for row in rows:
    if row["kind"] == "train":
      begun = bisect.bisect_right(firsts, row["step"])
      since = max([before, *firsts[max(begun - 1, 0) : begun]])
      waited += (row.get("input_wait_seconds") or 0.0) * (row["step"] - since)
      before = row["step"]
  return waited


def of(directory: "RunDirectory") -> Account:
  """The account of a run as its directory has it."""
  return account(directory.events(), directory.rows("train"))


def close(directory: "RunDirectory", ending: str) -> Account:
  """Records the account of a run, and then that it ended or left."""
  if not directory.writes:
    return account([], [])
  last = {"event": ending, "time": time.time()}
  found = account([*directory.events(), last], directory.rows("train"))
  seconds = {kind: round(seconds, 3) for kind, seconds in found.seconds.items()}
  directory.event("goodput", goodput=round(found.goodput, 4), wall=round(found.wall, 3), of=seconds)
  directory.event(ending)
  return found


def resume(directory: "RunDirectory", step: int) -> None:
  """Forgets the rows of steps that will be done again; an event says how much that is.

  `lost_steps` counts up to the last row that had been logged. The first start of a run resumes
  nothing.
  """
  if not directory.writes:
    return
  events, before = directory.events(), directory.rows("train")
  dropped = directory.drop_rows_after(step)
  begun = [i for i, event in enumerate(events) if event["event"] in ("start", "rollback")]
  if len(begun) < 2:
    return
  until = max((row["time"] for row in dropped if "time" in row), default=None)
  lost = lambda *more: account(more, before).seconds["lost work"]
  resumed = {"event": "resume", "time": time.time(), "step": step, "until": until}
  seconds = lost(*events, resumed) - lost(*events[: begun[-1]])
  done = max((row["step"] for row in dropped), default=step)
  fields = {"lost_steps": done - step, "lost_seconds": round(max(seconds, 0.0), 3)}
  directory.event("resume", step=step, **fields, until=until)


class Meter:
  """Goodput while a run trains: what earlier starts kept, and each interval of steps."""

  def __init__(self, directory: "RunDirectory"):
    before = of(directory) if directory.writes else account([], [])
    self._began = before.stretches[0].began if before.stretches else time.time()
    self._kept = before.seconds["compute"]

  def add(self, seconds: float, waited: float) -> float:
    """Counts an interval of steps, of which so much was waiting; returns the goodput so far."""
    self._kept += max(seconds - waited, 0.0)
    # The wall clock may be set back; no more than all of the time is kept.
    return self._kept / max(time.time() - self._began, self._kept, seconds)
