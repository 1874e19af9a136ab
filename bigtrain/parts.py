"""Parts: what happens around the training step. The loop calls them and knows none of them.

A new one is a class with the methods below, given to `train(..., parts=[...])`.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental import multihost_utils

from bigtrain.config import Refused
from bigtrain.tell import leaving, tell

if TYPE_CHECKING:
  from bigtrain.run import Run


class Part:
  """Called around each step, on every process. Steps are numbered by completed updates."""

  run: Run

  def start(self, run: Run, step: int) -> None:
    """Before the first step of this process, which follows `step` completed ones.

    Also when it goes on from an earlier step, after a fault.
    """
    self.run = run

  def before_step(self, step: int) -> None:
    """Before the update that follows `step` completed ones."""

  def after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """After update number `step` was dispatched; `metrics` may still be on their way."""

  def on_leave(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """The run leaves on a signal, saved after update number `step`; `metrics` are of the next one.

    That one was computed for this alone (replay.py), and is not a part of the run.
    """

  def on_away(self, phase: str) -> None:
    """Before time goes to something else ("evaluate", "save", ...), all updates so far being done.

    What belongs to the state is made durable here, before that is saved.
    """

  def close(self) -> None:
    """At the end, also after an error."""


class Behind(Part):
  """Looks at the metrics of a step when the next one has been dispatched.

  So devices never wait for the host, and no more than one step is ever ahead. Before time goes to
  something else, and at the last step, it looks at once.
  """

  def start(self, run: Run, step: int) -> None:
    super().start(run, step)
    self._pending: tuple[int, dict[str, Any]] | None = None

  def look(self, step: int, metrics: dict[str, Any]) -> None:
    """At the metrics of update number `step`; it waits for them where it reads them."""

  def after_step(self, step: int, metrics: dict[str, Any]) -> None:
    self.flush()
    self._pending = step, metrics
    if step == self.run.experiment.steps:
      self.flush()

  def on_away(self, phase: str) -> None:
    self.flush()

  def flush(self) -> None:
    """Looks at the pending step, if there is one."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self.look(*pending)


class Saver(Part):
  """Saves at the interval, at the last step, and when the run leaves.

  A save that failed in the background is raised at the next step.
  """

  def after_step(self, step: int, metrics) -> None:
    self.run.store.check()
    self.run.tell_saves()
    c, last = self.run.experiment.checkpoints, self.run.experiment.steps
    due = any(every and step % every == 0 for every in (c.every, c.keep_every))
    if not due and step != last and not self.run.left:
      return
    with self.run.away("save", step=step):
      if self.run.back_to is None:  # Else this state has no future.
        self.run.store.save(step, self.run.state, self.run.experiment)


class Signals(Part):
  """SIGTERM, Ctrl-C, a terminal that was closed: all processes save at one agreed step, and leave.

  Ctrl-C after that does what it did before the run, as does every signal before the first step,
  when there is nothing to save.
  """

  def __init__(self):
    # Not at a start: a run that rolls back begins again, and may be told to leave meanwhile.
    self.received: str | None = None
    self.before: dict[int, Any] = {}
    self.steps = 0  # Of this process.

  def after_step(self, step: int, metrics) -> None:
    self.steps += 1
    if not self.before and threading.current_thread() is threading.main_thread():
      # JAX itself catches SIGTERM where there are several processes, and tells all of them.
      caught = set(leaving()) - ({signal.SIGTERM} if jax.process_count() > 1 else set())
      self.before = {number: signal.signal(number, self._handle) for number in caught}
    if jax.process_count() > 1:
      # Not the step, which may go back: jax agrees on one more than the last count it was told,
      # which is 0 before the first step, and it asks for that very one.
      if multihost_utils.reached_preemption_sync_point(self.steps):
        self.received = self.received or "SIGTERM"
      else:
        return
    if self.received and step < self.run.experiment.steps:
      self.run.left = True
      self.run.directory.event("signal", signal=self.received, step=step)
      self.run.say(f"{self.received}: saving step {step}; the same command goes on from there")

  def _handle(self, number: int, frame) -> None:
    if self.received and number == signal.SIGINT:
      before = self.before[number]
      (before if callable(before) else signal.default_int_handler)(number, frame)
    self.received = signal.Signals(number).name
    tell(f"{self.received}: leaving after this step; Ctrl-C again stops at once")
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def close(self) -> None:
    for number, handler in self.before.items():
      signal.signal(number, handler)


class Profiler(Part):
  """A trace of some steps in RUN/profile, for xprof, TensorBoard or Perfetto."""

  def __init__(self, first: int, steps: int):
    if first < 0 or steps < 1:
      raise Refused(f"profile.start {first}, profile.steps {steps}: from 0 on, and 1 step or more")
    self.first, self.last, self.tracing = first, first + steps, False

  def start(self, run: Run, step: int) -> None:
    super().start(run, step)
    if not step <= self.first < run.experiment.steps:
      last = run.experiment.steps - 1
      run.say(f"no profile of step {self.first}: this start makes the steps {step} to {last}")

  def before_step(self, step: int) -> None:
    if step == self.first:
      jax.profiler.start_trace(os.fspath(self.run.directory.path / "profile"))
      self.tracing = True

  def after_step(self, step: int, metrics) -> None:
    if step == self.last:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    if self.tracing:
      jax.profiler.stop_trace()
      self.tracing = False
      self.run.directory.event("profile", first=self.first, last=self.last)


def default_parts() -> list[Part]:
  """The parts of every run. Evaluation comes before saving: its rows belong to the checkpoint."""
  from bigtrain.evaluate import Evaluating
  from bigtrain.incidents import Incidents
  from bigtrain.metrics import Recorder
  from bigtrain.replay import Replay
  from bigtrain.self_check import SelfCheck

  return [Signals(), Replay(), Recorder(), Incidents(), SelfCheck(), Evaluating(), Saver()]
