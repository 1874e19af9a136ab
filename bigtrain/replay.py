"""Replay: the first step behind a restore must be what it was when it was done before.

With a checkpoint lies what the step after it gave (next.json): its loss, its gradient's norm, and
the digest of all data consumed. A run that goes on from there does that step again, and goes on
only if it is the same: to the bit where nothing of the machine or the mesh has changed, else within
a tolerance; the data to the bit always.
"""

import math
import os
from typing import TYPE_CHECKING, Any

import jax

from bigtrain.failures import CheckFailed
from bigtrain.hints import either
from bigtrain.parts import Behind

if TYPE_CHECKING:
  from bigtrain.run import Run

TOLERANCES = {"loss": 5e-3, "gradient_norm": 5e-2}  # Relative, on another mesh or machine.
EXACT = "data_digest"
NAMES = (*TOLERANCES, EXACT)


class Replay(Behind):
  """Compares the first step of a run that goes on, and records what comes behind each save."""

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    # Where data are left out the step is not the one that was recorded, and is not recorded either.
    self.restored = step if run.directory.skipped_to(step) is None else None
    new = run.directory.allow_changes or self.restored is None
    self.expected = None if new else run.store.next_step(step)
    if self.expected is not None and not _is_whole(self.expected):
      run.directory.event("not_replayed", step=step)
      run.say(f"what step {step + 1} gave before cannot be read (next.json): it is not compared")
      self.expected = None

  def after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
    if step - 1 == self.restored and self.expected is not None:
      self._compare(step, found(metrics), self.expected)  # Now: nothing may come of a wrong one.
      self.restored = None  # It is recorded already.
    super().after_step(step, metrics)

  def on_leave(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self._keep(step, metrics)

  def look(self, step: int, metrics: dict[str, jax.Array]) -> None:
    if step - 1 in (self.restored, self.run.store.begun):
      self._keep(step - 1, metrics)

  def _keep(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Keeps with the save of `step` what the one behind it gave."""
    self.run.store.keep_next(step, found(metrics) | {"where": where(self.run)})

  def _compare(self, step: int, now: dict[str, float], then: dict[str, Any]) -> None:
    unchanged, told = then["where"] == where(self.run), []
    # A GPU's compiler chooses among algorithms by their speed, anew each time.
    exact = unchanged and jax.default_backend() != "gpu"
    for name, value in now.items():
      rtol = 0.0 if exact or name == EXACT else TOLERANCES[name]
      before = then[name]
      # What was no number may be none again.
      same = math.isnan(value) and math.isnan(before)
      if not same and not math.isclose(value, before, rel_tol=rtol):
        told.append(f"{name} is {value!r} and was {before!r}")
    self.run.directory.event("replayed", step=step, exact=exact, differs=told)
    if told:
      raise CheckFailed(
        f"step {step}, the first behind the restored checkpoint, is not what it was when it was "
        f"done before: {'; '.join(told)}. The data, the code or the machine have changed: nothing "
        f"was saved since; go on all the same with {either('allow_changes', 'allow_changes=True')}"
      )


def found(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """What is compared of a step."""
  return {name: float(jax.device_get(metrics[name])) for name in NAMES}


def _is_whole(record: Any) -> bool:
  if not isinstance(record, dict) or not isinstance(record.get("where"), dict):
    return False
  return all(isinstance(record.get(name), float) for name in NAMES)


def where(run: "Run") -> dict[str, Any]:
  """What decides the bits of a step, besides what is computed."""
  devices = jax.devices()
  return {
    "devices": [len(devices), devices[0].platform, devices[0].device_kind],
    "processes": jax.process_count(),
    "cores": os.cpu_count() if devices[0].platform == "cpu" else None,
    "jax": jax.__version__,
    "mesh": dict(run.mesh.shape) if run.mesh is not None else {},
    "microbatches": run.experiment.microbatches,
  }
