"""A step done again with checks: how large each of its tensors is, in the order of computation.

That is: what the batch holds, the parameters, what layers put out (taps.py), the loss, and the
gradients from the last layer backwards. Nothing is updated, and the state is not donated.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import compiler_options, guard, marks, sharding
from bigtrain.experiment import SOURCE, Experiment
from bigtrain.leaves import flatten
from bigtrain.objectives.output import mean
from bigtrain.optim.clip import global_norm
from bigtrain.parity.report import by_layer
from bigtrain.parity.steps import forward_order
from bigtrain.phases import got_on
from bigtrain.program import Program
from bigtrain.state import State
from bigtrain.statistics import STACK, unstacked

Batch = dict[str, jax.Array]
GROUPS = 128  # Of neighbouring rows: of more there is no loss of each.
GROUP = "checked rows "
TAPPED = ("score_max", "output")  # In the order of a layer.


@dataclasses.dataclass(frozen=True)
class Checked:
  """What a step gave: numbers of the whole batch, the same on every process."""

  loss: float
  norm: float  # Of the gradient.
  # Largest magnitudes, in the order of computation; NaN where one is not finite.
  sizes: dict[str, float]
  # (B,) whether a row's integers are out of range or its numbers not finite, by the array's name.
  wrong: dict[str, np.ndarray]
  losses: np.ndarray | None  # (B,) mean loss of each row, or of the few rows it stands among.

  @property
  def finite(self) -> bool:
    return bool(np.isfinite(self.loss) and np.isfinite(self.norm))


class Check:
  """The checks of an experiment's step, compiled for the shapes of a state and a batch.

  Args:
    experiment: may compute in another precision than the run whose state it is given.
    mesh: where both lie.
  """

  def __init__(
    self, experiment: Experiment, mesh: jax.sharding.Mesh | None, state: State, batch: Batch
  ):
    got_on()  # What was checked before has its own time.
    self.program = Program(experiment, mesh)
    self.limits = guard.limits(experiment.model)
    # Modules hold their settings: those of the state are the run's.
    begun = jax.eval_shape(self.program.init, jax.random.key(0))
    self.structure = jax.tree.structure((begun.model, begun.variables))
    model, variables = self._modules(state.model, state.variables)
    own = dataclasses.replace(state, model=model, variables=variables)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_typed(x))
    self.order = forward_order(experiment, own, jax.tree.map(shape, batch))
    lowered = jax.jit(self._check).lower(*_parts(state), jnp.int32(0), batch)
    self._compiled = lowered.compile(compiler_options=compiler_options.options(mesh))

  def __call__(self, state: State, batch: Batch, step: int) -> Checked:
    """The update that follows `step` completed ones, of that state."""
    at = jax.device_put(np.int32(step), state.step.sharding)
    found = jax.device_get(self._compiled(*_parts(state), at, batch))
    sizes = {f"batch/{name}": x for name, x in found["batch"].items()}
    of_parameters = by_layer(found["parameter"])
    order = [name for name in self.order if name in of_parameters]
    order += of_parameters.keys() - set(order)  # Whose use is hidden, as in a compiled kernel.
    sizes |= {f"parameter/{name}": of_parameters[name] for name in order}
    layers = {n: x for n, x in unstacked(found["taps"]).items() if n.split("/")[0] in TAPPED}
    sizes |= {name: layers[name] for name in sorted(layers, key=self._through)}
    sizes["loss"] = found["loss"]
    gradient = by_layer(found["gradient"])
    sizes |= {f"gradient/{name}": gradient[name] for name in reversed(order)}
    sizes["gradient_norm"] = found["norm"]
    numbers = {name: float(np.max(x)) for name, x in sizes.items()}
    losses = None
    if found["rows"]:
      means = np.array([loss / max(weight, 1e-9) for loss, weight in found["rows"]])
      losses = np.repeat(means, _group(n := _rows(batch)))[:n]
    return Checked(float(found["loss"]), float(found["norm"]), numbers, found["wrong"], losses)

  def _through(self, name: str) -> tuple[int, int]:
    """When the forward pass is through with a layer, and what comes first in it."""
    statistic, _, layer = name.partition("/")
    last = [i for i, n in enumerate(self.order) if f"{n}.".startswith(f"{layer}.")]
    return (last[-1] if last else len(self.order)), TAPPED.index(statistic)

  def _modules(self, *parts) -> Any:
    """Arrays of a state in modules of this experiment."""
    return jax.tree.unflatten(self.structure, jax.tree.leaves(parts))

  def _check(self, model, variables, seen, step, batch: Batch) -> dict[str, Any]:
    model, variables = self._modules(model, variables)
    gradient, output, _ = self.program.gradient(
      model,
      variables,
      batch | _groups(batch),
      self.program.key(step),
      marks.largest(seen),
      statistics=True,
    )
    sums = {"loss": (output.loss_sum, output.weight)} | output.metrics
    loss, weight = sums["loss"]
    names = [f"loss/{name.removeprefix(SOURCE)}" for name in _groups(batch)]
    return {
      "loss": guard.loss(self.program.experiment.model, batch, mean(loss, weight)),
      "norm": global_norm(gradient),
      "taps": output.taps,
      "parameter": largest(model),
      "gradient": largest(gradient),
      "batch": {name: _size(x.astype(jnp.float32)) for name, x in batch.items()},
      "wrong": {name: self._wrong(name, x) for name, x in batch.items()},
      "rows": [sums[name] for name in names if name in sums],
    }

  def _wrong(self, name: str, x) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
      found = ~jnp.isfinite(x)
    else:
      found = (x < 0) | (x >= self.limits.get(name, jnp.iinfo(jnp.int32).max))
    return sharding.lay(found.reshape(len(x), -1).any(axis=1), "R")


def largest(tree) -> dict[str, jax.Array]:
  """The largest magnitude of each array of numbers, by path; (repeats,) of stacks."""
  numbers = {n: x for n, x in flatten(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
  stacked = lambda name: STACK in name.split(".")
  return {name: _size(x, stacked(name)) for name, x in numbers.items() if x.size}


def _size(x, stacked: bool = False) -> jax.Array:
  x = jax.device_put(x, jax.memory.Space.Device)  # It may wait in the host's memory.
  over, finite = tuple(range(stacked, x.ndim)), jnp.isfinite(x)
  found = jnp.where(finite, jnp.abs(x), 0).max(over).astype(jnp.float32)
  # Counted: the largest of several devices' numbers need not be NaN where one of them is.
  odd = (~finite).sum(over)
  lay = lambda x: sharding.lay(x, "R" * stacked)
  return jnp.where(lay(odd) > 0, jnp.nan, lay(found))


def not_finite(tree) -> Iterator[str]:
  """The paths of arrays, wherever they lie, of which some number is not finite."""
  found: Callable[..., dict[str, jax.Array]] = jax.jit(largest)
  for name, size in jax.device_get(found(tree)).items():
    if not np.isfinite(size).all():
      yield name


def _parts(state: State) -> tuple[Any, Any, Any]:
  """What of a state a gradient depends on."""
  return state.model, state.variables, state.statistics.get("amax", {})


def _typed(x: jax.Array):
  """Where the mesh lays it; nothing of what lies on one device."""
  return x.sharding if isinstance(x.sharding, jax.NamedSharding) else None


def _rows(batch: Batch) -> int:
  return next(iter(batch.values())).shape[0]


def _group(rows: int) -> int:
  """How many rows have one loss together."""
  return -(-rows // GROUPS)


def _groups(batch: Batch) -> Batch:
  """Each few rows as a source of their own: what objectives say of sources, they say of rows."""
  rows = _rows(batch)
  at_B = jnp.arange(rows, out_sharding=sharding.act("B")) // _group(rows)
  groups = range(-(-rows // _group(rows)))
  return {f"{SOURCE}{GROUP}{i:03}": (at_B == i).astype(jnp.float32) for i in groups}
