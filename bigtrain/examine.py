"""The examination of a step whose update was not applied: which tensor went bad first, and why.

The step is done again with checks (checks.py): as it was; once more, which must give the same bits;
with another batch; in float32; and by other devices. From what differs follows the cause:

    hardware   a device fails the self-check, or a step done again is another one
    optimizer  the parameters, or what the optimizer remembers, are bad already: on any batch
    data       a number or an id that cannot be, or this batch alone is bad, in float32 too
    precision  float32 is fine
    unknown    none of this is clear

The host learns of a fault a step late, so that the state may be one good update further. Where the
step is fine when it is done again then, that is hardware if its numbers are far from those which
were recorded. All processes take part, and conclude the same.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import checks, evidence, guard, processes, self_check, sharding
from bigtrain.checks import Check, Checked
from bigtrain.config import configs
from bigtrain.data.feed import put
from bigtrain.evidence import Cause, Incident
from bigtrain.experiment import Experiment
from bigtrain.mesh import Mesh
from bigtrain.precision import compute_dtype
from bigtrain.replay import TOLERANCES
from bigtrain.secrets import first_line
from bigtrain.state import State

if TYPE_CHECKING:
  from bigtrain.run import Run

FAR = 2.0  # Times the numbers that were recorded: more than an update moves them.
HUGE = 100.0  # Times the largest input of another batch: a number that cannot be.
SPIKE = 4.0  # Times the size that a tensor has with another batch: where a spike shows.


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What examining a step gave; None where that could not be done or tells nothing."""

  bad: Mapping[str, bool]  # By what was done: "again", "other batch", "float32", "other devices".
  far: bool  # The step done again is far from what was recorded.
  exact: bool  # The state is that of the step.
  devices: str = ""  # What is wrong with them.
  state: str | None = None  # The first array that is not finite.
  inputs: str | None = None  # The first array of the batch that has what cannot be.

  def cause(self) -> Cause:
    if self.devices:
      return "hardware"
    if self.inputs:
      return "data"
    if self.state:
      return "optimizer"
    if not self.bad["again"]:
      return "hardware" if self.exact or self.far else "unknown"
    if self.bad.get("float32") is False:
      return "precision"
    if "other batch" not in self.bad:
      return "unknown"
    return "optimizer" if self.bad["other batch"] else "data"


def examine(run: "Run", found: Incident) -> Incident:
  """The same with its cause; a failure to find that is noted, and ends nothing."""
  try:
    return Examination(run, found).conclude()
  except Exception as error:
    note = f"the examination failed: {type(error).__name__}: {first_line(error)}"
    return dataclasses.replace(found, cause="unknown", note=note)


class Examination:
  """One step, done again in several ways."""

  def __init__(self, run: "Run", found: Incident):
    self.run, self.found, self.step = run, found, found.step - 1
    self.state: State = run.state
    self.batch = self._batch(self.step)
    self.done: dict[str, Checked] = {}

  def conclude(self) -> Incident:
    own = Check(self.run.experiment, self.run.mesh, self.state, self.batch)
    again, twice = (own(self.state, self.batch, self.step) for _ in range(2))
    self.done["again"] = again
    self._with_other_batches(own)
    devices = self._devices(again, twice)
    state, inputs = next(self._bad_state(), None), self._bad_input(again)
    notes = []
    if not (devices or state or inputs):
      notes = [self._in_float32(), self._elsewhere()]
      devices = self._other_devices(again)
    bad = {name: self._is_bad(checked) for name, checked in self.done.items()}
    far = _far(self.found.loss, again.loss) or _far(self.found.gradient_norm, again.norm)
    seen = Evidence(bad, far, self._is_same_state(), devices, state, inputs)
    cause = seen.cause()
    told = lambda name, c: {"loss": c.loss, "gradient_norm": c.norm, "bad": bad[name]}
    return dataclasses.replace(
      self.found,
      cause=cause,
      first_bad=inputs or state or self._first_bad(cause, twice),
      layers=again.sizes,
      rows=worst_rows(again),
      again={name: told(name, c) for name, c in self.done.items()}
      | {"same_state": seen.exact, "devices": devices or None},
      note="; ".join(filter(None, notes)),
    )

  def _batch(self, step: int) -> checks.Batch:
    data, size = self.run.data.stage(step), self.run.sizes.at(step)
    first = self.run.feed.example_at(step)
    read = lambda rows: data.batch(first, size, rows)
    # Who cannot read it must not leave the others alone in what all of them compute.
    with processes.together("a batch"):
      return put(read, size, sharding.batch_sharding())

  def _with_other_batches(self, own: Check) -> None:
    """Does the step with a batch near it, of the same shapes; one that is fine, if there is."""
    shapes = lambda step: self.run.data.stage(step).spec(self.run.sizes.at(step))
    for step in (self.step - 1, self.step + 1, self.step + 2):
      if step >= self.run.feed.first and shapes(step) == shapes(self.step):
        found = own(self.state, self._batch(step), step)
        if "other batch" not in self.done or not self._is_bad(found):
          self.done["other batch"] = found
        if not self._is_bad(found):
          break

  def _is_same_state(self) -> bool:
    """Whether no update has been applied since: there was none, or it was a fault too."""
    in_a_row = int(jax.device_get(self.state.statistics["guard"]["faults_in_a_row"]))
    return in_a_row > int(self.state.step) - self.found.step

  def _is_bad(self, checked: Checked) -> bool:
    """As the guard judges it."""
    if not checked.finite:
      return True
    limit = self.run.experiment.faults.spike
    if limit is None:
      return False
    memory = jax.device_get(self.state.statistics["guard"])
    now = jnp.array([checked.loss, np.log(max(checked.norm, 1e-30))], jnp.float32)
    full = memory["accepted"] >= self.run.experiment.faults.window
    return bool(full and np.max(guard.z_scores(memory["recent"], now)) > limit)

  def _bad_state(self):
    parts = {
      "parameter": self.state.model,
      "variable": self.state.variables,
      "optimizer": self.state.optimizer,
    }
    for kind, tree in parts.items():
      yield from (f"{kind}/{name}" for name in checks.not_finite(tree))

  def _bad_input(self, again: Checked) -> str | None:
    other = self.done.get("other batch")
    for name, wrong_B in again.wrong.items():
      name = f"batch/{name}"
      huge = other and again.sizes[name] > HUGE * max(other.sizes[name], 1.0)
      is_id = not np.issubdtype(self.batch[name.partition("/")[2]].dtype, np.floating)
      if wrong_B.any() or (huge and not is_id):
        return name
    return None

  def _devices(self, again: Checked, twice: Checked) -> str:
    """What is wrong with devices, by the self-check or by a step that is not twice the same."""
    wrong = "; ".join(f"{self_check.place(d)}: {w}" for d, w in self_check.wrong().items())
    if wrong := processes.all_said(wrong):
      return wrong
    exact = jax.default_backend() != "gpu"
    return "the same step gave two results" if _differ(again, twice, exact=exact) else ""

  def _in_float32(self) -> str:
    if (wide := in_float32(self.run.experiment)) is None:
      return ""
    try:
      self.done["float32"] = Check(wide, self.run.mesh, self.state, self.batch)(
        self.state, self.batch, self.step
      )
    except Exception as error:  # Such as of its memory.
      return f"not done in float32: {first_line(error)}"
    return ""

  def _elsewhere(self) -> str:
    """Does the step on other devices, where one process can move all of it there."""
    if (mesh := other_mesh(self.run)) is None:
      return ""
    experiment = self.run.experiment
    if self.run.mesh is None:  # The host's CPU computes in float32.
      experiment = in_float32(experiment) or experiment
    try:
      with jax.set_mesh(mesh):
        move = functools.partial(_moved, mesh)
        state = jax.tree.map(move, dataclasses.replace(self.state, optimizer=()))
        batch = jax.tree.map(move, self.batch)
        self.done["other devices"] = Check(experiment, mesh, state, batch)(state, batch, self.step)
    except Exception as error:
      return f"not done on other devices: {first_line(error)}"
    return ""

  def _other_devices(self, again: Checked) -> str:
    if (other := self.done.get("other devices")) is None:
      return ""
    here = again if self.run.mesh is not None else self.done.get("float32", again)
    same = self._is_bad(other) == self._is_bad(here) and not _differ(here, other)
    return "" if same else "other devices give another result"

  def _first_bad(self, cause: Cause, twice: Checked) -> str | None:
    again, usual = self.done["again"], self.done.get("other batch")
    if cause == "hardware":
      other = self.done.get("other devices", twice)
      return _first(again.sizes, lambda name, x: not _near(x, other.sizes[name]))
    if not again.finite:
      return _first(again.sizes, lambda _, x: not math.isfinite(x))
    if usual is None or not self._is_bad(again):
      return None
    return _first(again.sizes, lambda name, x: x > SPIKE * max(usual.sizes[name], 1e-30))


def in_float32(experiment: Experiment) -> Experiment | None:
  """The same, with nothing computed in fewer bits; None if that is what it is."""
  wide = copy.deepcopy(experiment)
  wide.products = None
  changed = experiment.products is not None
  for _, node in configs(wide):
    if (dtype := getattr(node, "dtype", None)) is not None:
      changed |= compute_dtype(dtype) != np.float32
      node.dtype = "float32"  # pyright: ignore[reportAttributeAccessIssue]
  return wide if changed else None


def other_mesh(run: "Run") -> jax.sharding.Mesh | None:
  """Where each part is computed by another device than in training; None where there is none."""
  if jax.process_count() > 1:
    return None
  if run.mesh is not None:
    devices = np.roll(run.mesh.devices.reshape(-1), 1).reshape(run.mesh.devices.shape)
    return jax.sharding.Mesh(devices, run.mesh.axis_names, axis_types=run.mesh.axis_types)
  if jax.default_backend() == "cpu":
    return None
  return Mesh().make(jax.devices("cpu")[:1])


def worst_rows(checked: Checked) -> tuple[int, ...]:
  """Rows with what cannot be first, then by their loss, NaN before all numbers."""
  wrong_B = np.any(list(checked.wrong.values()), axis=0)
  loss_B = np.zeros(len(wrong_B)) if checked.losses is None else checked.losses
  loss_B = np.where(np.isnan(loss_B), np.inf, loss_B)
  order = np.lexsort((-loss_B, ~wrong_B))
  return tuple(map(int, order[: evidence.ROWS]))


def _moved(mesh: jax.sharding.Mesh, x: jax.Array) -> jax.Array:
  if isinstance(x.sharding, jax.NamedSharding):
    return jax.device_put(x, jax.NamedSharding(mesh, x.sharding.spec))
  return jax.device_put(np.asarray(x), jax.NamedSharding(mesh, jax.P()))


def _far(recorded: float, again: float) -> bool:
  if not (math.isfinite(recorded) and math.isfinite(again)):
    return math.isfinite(recorded) != math.isfinite(again)
  return max(recorded, again) > FAR * max(min(recorded, again), 1e-30)


def _differ(a: Checked, b: Checked, *, exact: bool = False) -> bool:
  """Whether two results of one step are not one, to rounding or to the bit."""
  if exact:
    return not all(np.array_equal(x, b.sizes[n], equal_nan=True) for n, x in a.sizes.items())
  pairs = ((a.loss, b.loss, TOLERANCES["loss"]), (a.norm, b.norm, TOLERANCES["gradient_norm"]))
  return any(not _near(x, y, rtol) for x, y, rtol in pairs)


def _near(x: float, y: float, rtol: float = TOLERANCES["gradient_norm"]) -> bool:
  if not (math.isfinite(x) and math.isfinite(y)):
    return math.isfinite(x) == math.isfinite(y)
  return abs(x - y) <= rtol * max(abs(x), abs(y))


def _first(sizes: Mapping[str, float], is_bad) -> str | None:
  return next((name for name, x in sizes.items() if is_bad(name, x)), None)
