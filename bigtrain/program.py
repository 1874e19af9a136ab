"""The program of an experiment: initialisation and the training step, pure and compiled."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from bigtrain import compiler_options, digest, failures, guard, marks, sharding, taps
from bigtrain.data import cache
from bigtrain.experiment import Experiment
from bigtrain.mesh import platform
from bigtrain.objectives import Output
from bigtrain.objectives.experts import load_max, rebalanced, with_experts
from bigtrain.objectives.output import mean
from bigtrain.optim.clip import global_norm
from bigtrain.optim.on_host import HOST, is_sent, on_host
from bigtrain.state import State, combine, partition
from bigtrain.statistics import sizes
from bigtrain.stored import narrowed, updated, widened
from bigtrain.trusted import check_own


class Program:
  """The functions of an experiment that are compiled; they are pure. `mesh` is the one in force."""

  def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh | None):
    self.experiment, self.mesh = experiment, mesh
    width = experiment.model.width()
    transformation = guard.guarded(experiment.optimizer.make(experiment.steps, width))
    self.transformation = (
      on_host(transformation) if experiment.optimizer_on_host else transformation
    )
    self.learning_rate = experiment.optimizer.learning_rate(experiment.steps)

  def init(self, key: jax.Array) -> State:
    """The state before the first update: the same bits on any mesh."""
    e = self.experiment
    model, variables = partition(e.model.make(key))
    seen = marks.histories(e.products, model)
    return State(
      step=jnp.zeros((), jnp.int32),
      example=jnp.zeros((), jnp.uint32),
      model=narrowed(e.weights, model),
      optimizer=self.transformation.init(model),
      variables=variables,
      statistics={
        "consumed": jnp.zeros((), jnp.uint32),
        "guard": guard.begin(e.faults),
        "highest": jnp.zeros((), jnp.float32),
        **({"amax": seen} if seen else {}),
      },
    )

  def step(
    self, state: State, batch: dict[str, jax.Array], *, statistics: bool = False
  ) -> tuple[State, dict[str, Any]]:
    """One update, and its metrics as scalars.

    Two dicts are among them: "weights" has what each mean is of, by its name, and with `statistics`
    "layers" has the statistics of each layer. The mean of nothing is 0, and its weight says so.
    """
    key, kept = self.key(state.step), state.statistics
    seen = kept.get("amax", {})
    gradient, output, variables = self.gradient(
      state.model, state.variables, batch, key, marks.largest(seen), statistics=statistics
    )
    sums = {"loss": (output.loss_sum, output.weight)} | output.metrics
    metrics: dict[str, Any] = {name: mean(*pair) for name, pair in sums.items()}
    metrics["loss"] = guard.loss(self.experiment.model, batch, metrics["loss"])
    norm, faults = global_norm(gradient), self.experiment.faults
    good, score, memory = guard.judge(faults, kept["guard"], metrics["loss"], norm)
    wide, rate = widened(state.model), guard.rate(faults, memory)
    updates, optimizer = self.transformation.update(
      gradient, state.optimizer, wide, good=good, lowered=rate
    )
    model = updated(state.model, updates, key)
    consumed = digest.followed(kept["consumed"], digest.of_batch(batch))
    # Since the last row, which a run that leaves between two rows has to know when it goes on.
    begins, highest = state.step % self.experiment.logging.every == 0, metrics["loss"]
    highest = jnp.where(begins, highest, jnp.maximum(kept["highest"], highest))
    kept = kept | {"consumed": consumed, "guard": memory, "highest": highest}
    if seen:
      kept |= {"amax": guard.chosen(good, marks.followed(seen, output.amax), seen)}
    metrics |= {
      "weights": {name: weight for name, (_, weight) in sums.items()},
      "weight": output.weight,
      "learning_rate": self.learning_rate(state.step) * (1.0 if rate is None else rate),
      "gradient_norm": norm,
      "skipped": 1.0 - good,
      "data_digest": consumed,
    }
    if self.experiment.logging.every > 1:
      metrics["loss_max"] = highest
    if faults.spike is not None:
      metrics["spike_score"] = score
    if output.loads:
      metrics["load_max"] = load_max(output.loads)
    if statistics:
      of_trees = sizes(gradient=gradient, parameter=wide, update=updates)
      metrics["layers"] = of_trees | output.taps
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      example=state.example + jnp.uint32(jax.tree.leaves(batch)[0].shape[0]),
      model=model,
      optimizer=optimizer,
      variables=guard.chosen(good, variables, state.variables),
      statistics=kept,
    )
    return state, metrics

  def key(self, step) -> jax.Array:
    """Of what the update after `step` completed ones draws."""
    # Folding in a small number gives a key that `init` has split off: a branch beside those.
    steps = jax.random.fold_in(jax.random.key(self.experiment.seed), 2**32 - 1)
    return jax.random.fold_in(steps, step)

  def gradient(
    self,
    model,
    variables,
    batch: dict[str, jax.Array],
    key,
    amax: marks.Amax | None = None,
    *,
    statistics: bool = False,
  ) -> tuple[Any, Output, Any]:
    """The gradient of the mean loss, the sums over the batch, and the variables after it.

    Microbatches add up sums, which are divided once: the result is that of the whole batch to
    rounding, also where microbatches hold different numbers of tokens. Variables go through them
    in turn. `amax` is what delayed scaling scales by, and `Output.amax` what was seen (marks.py).
    """

    objective = with_experts(self.experiment.objective)
    tapped = taps.collect(objective) if statistics else lambda *args: (objective(*args), {})

    def loss(model, amax, variables, batch, key):
      module = marks.low(self.experiment.products, combine(model, variables), amax)
      output, found = tapped(module, batch, key)
      after = variables if output.variables is None else output.variables
      return output.loss_sum, (dataclasses.replace(output, variables=None), after, found)

    def grad(variables, batch, key):
      of_loss = jax.grad(loss, argnums=(0, 1), has_aux=True)
      (gradient, seen), found = of_loss(model, amax or {}, variables, batch, key)
      return widened(gradient), seen, found

    n = self.experiment.microbatches
    if n == 1:
      total, seen, (output, variables, found) = grad(variables, batch, key)
    else:
      # Rows m, m + n, m + 2n, ... form microbatch m: every device keeps the rows it has.
      def split(x):
        sizes = (x.shape[0] // n, n, *x.shape[1:])
        return jnp.swapaxes(jax.lax.reshape(x, sizes, out_sharding=sharding.act("B")), 0, 1)

      parts = (jax.tree.map(split, batch), jnp.arange(n))

      def add(carry, part):
        (sums, seen, variables), (rows, m) = carry, part
        with sharding.every(n, m):
          gradient, more, (output, variables, found) = grad(variables, rows, key)
        sums = jax.tree.map(jnp.add, sums, (gradient, output))
        return (sums, jax.tree.map(jnp.maximum, seen, more), variables), found

      first = jax.tree.map(lambda x: x[0], parts[0])
      gradient, seen, (output, _, _) = jax.eval_shape(grad, variables, first, key)
      sums, seen = jax.tree.map(jnp.zeros_like, ((gradient, output), seen))
      ((total, output), seen, variables), found = jax.lax.scan(add, (sums, seen, variables), parts)
      found = taps.over_microbatches(found)
    if output.loads:  # Of all microbatches together.
      variables = rebalanced(combine(model, variables), variables, output.loads)
    weight = jnp.maximum(output.weight, 1e-9)  # A batch of padding alone has no gradient.
    gradient = jax.tree.map(lambda g: g / weight.astype(g.dtype), total)
    return gradient, dataclasses.replace(output, taps=taps.values(found), amax=seen), variables

  def abstract(self) -> State:
    """Shapes, dtypes and shardings of the state."""
    # The key too is traced: on the devices of a topology nothing can run.
    state = jax.eval_shape(lambda: self.init(jax.random.key(0)))
    on_host = lambda x: self.experiment.optimizer_on_host and is_sent(x)
    waiting = jax.tree.map(lambda x: self._place(x, HOST if on_host(x) else None), state.optimizer)
    return dataclasses.replace(jax.tree.map(self._place, state), optimizer=waiting)

  def _place(self, x, memory: str | None = None) -> jax.ShapeDtypeStruct:
    """A traced array where it lies when the step is called; without a mesh, on jax's one device."""
    if self.mesh is not None:
      spec = x.sharding.spec if x.sharding else jax.P()  # Tracing gives constants none.
      place = jax.sharding.NamedSharding(self.mesh, spec, memory_kind=memory)
    else:
      place = memory and jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=memory)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  def compile_init(self):
    """Initialisation, compiled. On CPU it is not optimised: it runs once, for a moment."""
    options: dict[str, str | bool] = {}
    if platform() == "cpu":
      options["xla_backend_optimization_level"] = "0"
    return jax.jit(self.init).lower(jax.random.key(0)).compile(compiler_options=options)

  def compile_step(self, spec: dict[str, jax.ShapeDtypeStruct], *, statistics: bool = False):
    """The training step for batches of that spec, compiled: `(leaves, batch) -> leaves, metrics`.

    It takes and donates the leaves of a state, not the tree: to take a module apart and to build it
    again at each call costs more than all else that the loop does. A batch of another shape is an
    error when it is called, never a silent recompilation.
    """
    place = sharding.batch_sharding()
    batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for k, s in spec.items()}
    leaves, structure = jax.tree.flatten(self.abstract())

    def step(leaves: list[jax.Array], batch):
      state = jax.tree.unflatten(structure, leaves)
      state, metrics = self.step(state, batch, statistics=statistics)
      leaves, after = jax.tree.flatten(state)
      if after != structure:
        raise TypeError(f"an update made of the state\n{structure}\nanother tree:\n{after}")
      return leaves, metrics

    lowered = jax.jit(step, donate_argnums=0).lower(leaves, batch)
    compiled = lowered.compile(compiler_options=compiler_options.options(self.mesh))
    failures.check_memory(compiled)
    return compiled


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that a restart does not compile again.

  The directory is this user's own: what lies in it is executed. JAX_COMPILATION_CACHE_DIR names
  another one, which several hosts may share.

  Raises:
    Refused: others can write there.
  """
  if (path := jax.config.values["jax_compilation_cache_dir"]) is None:
    path = cache.root() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(path))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  check_own(path, "set JAX_COMPILATION_CACHE_DIR to a folder of your own, with chmod 700")
