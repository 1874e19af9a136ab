"""Incidents: what the host does when the guard (guard.py) did not apply an update.

It learns of that one step late, as of all metrics. Every process sees the same numbers and so does
the same: an event, a record under incidents/ of what was found (examine.py), and what the policy of
`Experiment.faults` says.
"""

from typing import TYPE_CHECKING

import jax

from bigtrain import examine
from bigtrain.failures import CheckFailed
from bigtrain.parts import Part

if TYPE_CHECKING:
  from bigtrain.run import Run

EXAMINED = 3  # Incidents of one start that are examined: each compiles another program.


class Incidents(Part):
  """Records steps that the guard did not apply, and follows the policy."""

  met = 0  # Incidents of this process, also before it rolled back.

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    self.pending: tuple[int, dict[str, jax.Array]] | None = None
    self.in_a_row = 0  # Faults.

  def after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self.flush()
    self.pending = step, metrics
    if step == self.run.experiment.steps:
      self.flush()

  def on_away(self, phase: str) -> None:
    self.flush()

  def flush(self) -> None:
    """Waits for the pending step, and does what is to be done if it was a fault."""
    if self.pending is None:
      return
    (step, metrics), self.pending = self.pending, None
    if not float(metrics["skipped"]):
      self.in_a_row = 0
      return
    self.in_a_row, self.met = self.in_a_row + 1, self.met + 1
    incident = examine.incident(self.run, step, jax.device_get(metrics))
    if self.met <= EXAMINED:
      with self.run.away("examine", step=step):
        incident = examine.examine(self.run, incident)
    path = examine.keep(self.run, incident)
    told = {name: incident[name] for name in ("kind", "cause", "first_bad")}
    self.run.directory.event("incident", step=step, path=path, **told)
    self.run.say(examine.told(incident))
    self._follow(step, examine.told(incident))

  def _follow(self, step: int, told: str) -> None:
    c = self.run.experiment.faults
    if c.policy == "stop":
      raise CheckFailed(f"{told}; the run stops, as faults.policy says")
    if self.in_a_row >= c.patience and c.policy != "roll_back":
      raise CheckFailed(
        f"{told}; it is the {self.in_a_row}th step in a row whose update was not applied, so the "
        f"run stops (faults.patience)"
      )
    if c.policy == "roll_back":
      if self.met > c.patience:
        raise CheckFailed(f"{told}; rolling back did not help {c.patience} times, so the run stops")
      self.run.back_to = max(step - 1 - c.back, 0), self.run.feed.example_at(step)
