"""Incidents: what the host does when the guard (guard.py) did not apply an update.

It learns of that one step late, as of all metrics. Every process sees the same numbers and so does
the same: an event, a record under incidents/ of what was found (examine.py), and what the policy of
`Experiment.faults` says.
"""

import math
from typing import TYPE_CHECKING

import jax

from bigtrain import checks, evidence, examine, processes
from bigtrain.evidence import Incident
from bigtrain.failures import CheckFailed
from bigtrain.hints import either, to_set
from bigtrain.parts import Behind
from bigtrain.phases import within
from bigtrain.run import Back

if TYPE_CHECKING:
  from bigtrain.run import Run


class Incidents(Behind):
  """Records steps that the guard did not apply, and follows the policy."""

  met = 0  # Incidents of this process, also before it rolled back.
  rolled_back: tuple[float, int] = (math.inf, 0)  # To which step, and how many times to none later.

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    self.begun = step
    self.in_a_row = int(jax.device_get(run.state.statistics["guard"]["faults_in_a_row"]))

  def look(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Waits for a step, and does what is to be done if it was a fault."""
    if not float(metrics["skipped"]):
      self.in_a_row = 0
      return
    if self.run.back_to is not None:  # It has no part in the run: that goes on from before it.
      return
    self.in_a_row, self.met = self.in_a_row + 1, self.met + 1
    found = evidence.incident(self.run, step, jax.device_get(metrics))
    if self.met <= self.run.experiment.faults.examine:
      with self.run.away("examine", step=step):
        found = examine.examine(self.run, found)
    found, path = evidence.keep(self.run, found)
    told = {name: getattr(found, name) for name in ("kind", "cause", "first_bad")}
    more = {"note": found.note} if found.note else {}
    self.run.directory.event("incident", step=step, **told, path=path, **more)
    self.run.say(f"{found.told}{f'; kept in {path}' if path else ''}")
    self._follow(found)

  def _follow(self, found: Incident) -> None:
    c = self.run.experiment.faults
    if c.policy == "stop":
      skip = to_set("faults.policy", "skip")
      raise CheckFailed(
        f"{found.brief}; the run stops, as faults.policy says, at that step each time; go on "
        f"without it by {skip} {either('allow_changes', 'and allow_changes=True')}"
      )
    if c.policy == "roll_back":
      self._roll_back(found)
    elif found.kind == "nonfinite" and self.in_a_row >= c.patience:
      # As many spikes are the new normal: the guard takes the next one.
      raise CheckFailed(
        f"step {found.step}: updates of {self.in_a_row} steps in a row were not applied, the last "
        f"one's cause: {found.cause}; the run stops (faults.patience)"
      )
    else:
      self.run.directory.event("skip", step=found.step)

  def _roll_back(self, found: Incident) -> None:
    """Asks the loop to go on from an earlier state, with the data behind this step."""
    c, known = self.run.experiment.faults, self._saved()
    # Where the first step behind it is bad already, so may be what was saved.
    useless = found.step - 1 == self.begun and (found.cause == "optimizer" or self._is_spoilt())
    before = [s for s in known if s < (self.begun if useless else found.step)]
    if known and not before:
      raise CheckFailed(f"{found.brief}; no checkpoint is from before that, so the run stops")
    # `back` may be further than what is kept.
    to = max((s for s in before if s < found.step - c.back), default=min(before, default=0))
    last, times = self.rolled_back
    self.rolled_back = to, (times + 1 if to <= last else 1)
    if self.rolled_back[1] > c.patience:
      raise CheckFailed(
        f"{found.brief}; rolling back to step {to} did not help {c.patience} times, so the run "
        "stops (faults.patience)"
      )
    self.run.back_to = Back(found.step, to, self.run.feed.example_at(found.step))

  def _is_spoilt(self) -> bool:
    state = self.run.state
    return any(checks.not_finite((state.model, state.variables, state.optimizer)))

  def _saved(self) -> list[int]:
    """The steps of all finished saves, as the first process sees them."""
    with within("save"):
      self.run.store.wait()
    return processes.gather(self.run.store.steps())[0]
