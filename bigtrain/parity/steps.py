"""Steps of training on one device, and the same steps on a mesh.

A step is compared in two halves, each of which is given what the single device had: the gradient
from its weights, and the update from its gradient. So nothing drifts apart, a fault shows where it
is and not in all that follows, and Adam, which divides by the size of the gradient, cannot make an
update of its rounding. As all that a step returns is compared, steps that are equal one by one are
equal in a row.

The gradient that becomes an update has noise of its own size added. A gradient of few tokens has
few directions, and optimizers that make all directions equally long (Muon, SOAP) would make the
others of rounding alone.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Var

from bigtrain import compiler_options, sharding
from bigtrain.data.feed import put
from bigtrain.experiment import Experiment
from bigtrain.leaves import path_name
from bigtrain.optim.layout import layout
from bigtrain.parity.report import KINDS, Report, Tensor, by_layer, named
from bigtrain.program import Program
from bigtrain.state import State, combine

NOISE = 0.1  # Largest standard deviation of what weights are moved by at the beginning.
# A program that runs a few times is compiled in a third of the time without these, and rounds as
# it would. (jax 0.12 has no emitters to leave out.)
QUICK: tuple[dict[str, str | bool], ...] = (
  {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False},
  {"xla_backend_optimization_level": "0"},
)

Trees = dict[str, Any]  # What a half of a step returns, by its kind, in numpy.


class Halves:
  """Both halves of a step, compiled for a mesh, or without one for one device."""

  def __init__(self, e: Experiment, mesh: jax.sharding.Mesh | None):
    self.e, self.mesh = e, mesh
    self.program = Program(e, mesh)
    with self._in_mesh():
      self.state, self.rows = self.program.abstract(), sharding.batch_sharding()
      spec = e.data.make(e.seed).spec(e.batch)
      laid = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self.rows)
      batch = {name: laid(s) for name, s in spec.items()}
      options = compiler_options.options(mesh)
      self._gradient = _compiled(self._backward, self.state, batch, **options)
      self._update = _compiled(self._follow, self.state, self.state.model, **options)

  def gradient(self, state: State, batch: Callable) -> Trees:
    """The loss, the sums, what layers report, the gradient and the variables behind a batch."""
    with self._in_mesh():
      rows = put(batch, self.e.batch, self.rows)
      return jax.device_get(self._gradient(self._placed(state, self.state), rows))

  def update(self, state: State, gradient) -> Trees:
    """The updates that the optimizer makes of a gradient, and its state behind them."""
    with self._in_mesh():
      given = self._placed(gradient, self.state.model)
      return jax.device_get(self._update(self._placed(state, self.state), given))

  def _backward(self, state: State, batch) -> Trees:
    key = self.program.key(state.step)
    gradient, output, variables = self.program.gradient(
      state.model, state.variables, batch, key, statistics=True
    )
    sums = {"objective": (output.loss_sum, output.weight)} | output.metrics
    loads = {f"load/{layer}": x for layer, x in output.loads.items()}
    pairs = {name: jnp.stack(pair) for name, pair in sums.items()}  # Sum and weight.
    return self._readable(
      {"output": output.taps | loads, "loss": pairs, "gradient": gradient, "variables": variables}
    )

  def _follow(self, state: State, gradient) -> Trees:
    updates, optimizer = self.program.transformation.update(gradient, state.optimizer, state.model)
    return self._readable({"update": updates, "optimizer": optimizer})

  def _readable(self, trees: Trees) -> Trees:
    """Whole on every device, where several processes each read all of it."""
    alone = self.mesh is None or jax.process_count() == 1
    return trees if alone else jax.sharding.reshard(trees, jax.P())

  def _placed(self, tree, like):
    """What every process has whole, where the mesh lays it."""
    if self.mesh is None:
      return jax.device_put(tree)

    def place(x, to):
      x = np.asarray(x)
      return jax.make_array_from_callback(x.shape, to.sharding, lambda at: x[at])

    return jax.tree.map(place, tree, like)

  def _in_mesh(self):
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _compiled(function: Callable, *args, **options) -> jax.stages.Compiled:
  return jax.jit(function).lower(*args).compile(compiler_options=_quick() | options)


@functools.cache
def _quick() -> dict[str, str | bool]:
  """The first of the options that this compiler has."""
  for options in QUICK:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.jit(lambda x: x + 1).lower(0).compile(compiler_options=options)
      return options
  return {}


@dataclasses.dataclass(frozen=True)
class Step:
  """A step on one device: what its halves were given, and what they made of it."""

  state: State
  given: Any  # The gradient that became an update.
  trees: Trees
  moved: Trees  # The same from numbers that were moved by their last bit.


class Reference:
  """The steps of an experiment on one device, which do not depend on its mesh."""

  def __init__(self, e: Experiment):
    halves, random = Halves(e, None), np.random.default_rng(e.seed)
    state = _begun(halves.program, random)
    self.steps: list[Step] = []
    for i in range(e.steps):
      batch = batches(e, i)
      near = lambda tree: jax.tree.map(lambda x: _last_bit(x, random), tree)
      gradient, moved = halves.gradient(state, batch), near(state)
      given = jax.tree.map(lambda g: _with_noise(g, random), gradient["gradient"])
      update = halves.update(state, given)
      moved_trees = halves.gradient(moved, batch) | halves.update(moved, near(given))
      self.steps.append(Step(state, given, gradient | update, moved_trees))
      state = dataclasses.replace(
        state,
        step=state.step + 1,
        model=jax.device_get(optax.apply_updates(state.model, update["update"])),
        optimizer=update["optimizer"],
        variables=gradient["variables"],
      )


def compare(e: Experiment, reference: Reference, mesh: jax.sharding.Mesh) -> Report:
  """What a mesh makes of the steps of `reference`, which are those of `e` on one device.

  What the mesh does not report of a layer is left out: in a ring no device sees all scores.
  """
  reported = lambda kind, name, got: kind != "output" or name in got
  halves, tensors = Halves(e, mesh), {}
  for i, step in enumerate(reference.steps):
    trees = halves.gradient(step.state, batches(e, i)) | halves.update(step.state, step.given)
    for kind in KINDS:
      got, wanted, moved = (named(kind, x[kind]) for x in (trees, step.trees, step.moved))
      for name in (name for name in wanted if reported(kind, name, got)):
        tensor = tensors.setdefault((kind, name), Tensor(kind, name))
        tensor.see(got[name], wanted[name], moved[name])
  axes = {axis: n for axis, n in mesh.shape.items() if n > 1}
  order = lambda: forward_order(e, reference.steps[0].state)
  return Report(axes, list(tensors.values()), order)


def batches(e: Experiment, step: int) -> Callable:
  """The rows that are asked for of the batch of a step."""
  data = e.data.make(e.seed)
  return lambda rows: data.batch(step * e.batch, e.batch, rows)


def _begun(program: Program, random: np.random.Generator) -> State:
  """The first state, its weights moved at random, in numpy: nothing is zero, one or equal.

  A matrix of many rows is moved by less, so that what it makes stays as large as its input.
  """
  key = jax.random.key(program.experiment.seed)
  state = _compiled(program.init, key)(key)

  def moved(path, w):
    rows = layout(path, w).sides(w)[0] if layout(path, w).rows else 1
    noise = random.normal(0, min(NOISE, rows**-0.5), w.shape)
    return w + noise.astype(w.dtype)

  model = jax.tree_util.tree_map_with_path(moved, jax.device_get(state.model))
  optimizer = _compiled(program.transformation.init, model)(model)
  return jax.device_get(dataclasses.replace(state, model=model, optimizer=optimizer))


def _last_bit(x, random: np.random.Generator):
  """`x`, each of its elements moved up or down by about its last bit, or not."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  return (x * (1 + np.finfo(x.dtype).eps * random.integers(-1, 2, x.shape))).astype(x.dtype)


def _with_noise(x, random: np.random.Generator):
  size = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
  return (x + size * random.normal(size=x.shape)).astype(x.dtype)


def forward_order(e: Experiment, state: State, rows: Any = None) -> list[str]:
  """Names of the parameters, layer by layer, in the order in which the forward pass uses them.

  It is traced with `rows`, shapes will do; with those of the first batch if there are none.
  """
  if rows is None:
    rows = {k: jnp.asarray(v) for k, v in batches(e, 0)(slice(None)).items()}
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state.model), strict=True)
  structure = jax.tree.structure(state.model)

  def loss(*inputs):
    leaves, rows = inputs[:-1], inputs[-1]
    model = combine(jax.tree.unflatten(structure, leaves), state.variables)
    return e.objective(model, rows, jax.random.key(0)).loss_sum

  found: dict[int, None] = {}
  _first_uses(jax.make_jaxpr(loss)(*leaves, rows).jaxpr, None, found)
  stacks = {path_name(paths[i]): np.empty(leaves[i].shape[:1]) for i in found if i < len(leaves)}
  return list(by_layer(stacks))


def _first_uses(jaxpr, inputs: dict | None, found: dict[int, None]) -> None:
  """Adds the numbers of the inputs to `found` as they are used; `inputs` says which these are."""
  inputs = {v: i for i, v in enumerate(jaxpr.invars)} if inputs is None else inputs
  for eqn in jaxpr.eqns:
    for inner in _inner(eqn.params.values()):
      # What comes before the arguments, such as the index of a branch, is not handed on.
      pairs = zip(reversed(inner.invars), reversed(eqn.invars), strict=False)
      known = {i: inputs[v] for i, v in pairs if isinstance(v, Var) and v in inputs}
      _first_uses(inner, known, found)
    for v in eqn.invars:
      if isinstance(v, Var) and v in inputs:
        found[inputs[v]] = None


def _inner(values):
  """The jaxprs among the parameters of an equation."""
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from _inner(value)
    elif hasattr(jaxpr := getattr(value, "jaxpr", value), "eqns"):
      yield jaxpr
