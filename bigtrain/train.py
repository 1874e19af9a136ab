"""The program: State, the training step, and the loop that calls it. Read it from top to bottom.

What happens around the step (evaluation, checkpoints, logs, profiles, signals) are parts; the loop
just calls them.
"""

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigtrain import checkpoint, processes, sharding
from bigtrain.cli import Profile
from bigtrain.config import dump
from bigtrain.data import cache
from bigtrain.data.feed import Feed, Sizes
from bigtrain.experiment import Experiment
from bigtrain.objectives import Output
from bigtrain.optim.optimizer import global_norm
from bigtrain.parts import Part, default_parts
from bigtrain.run import Run, load_run
from bigtrain.run_directory import RunDirectory
from bigtrain.validate import validate
from bigtrain.writers import default_writers

__all__ = ["Program", "Run", "State", "load_run", "train"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything that decides the future of a run, besides its experiment."""

  step: jax.Array  # Completed updates, int32.
  example: jax.Array  # The next global example, uint32: the data position.
  model: Any  # An nnx.Module: a pytree of float32 parameters.
  optimizer: optax.OptState
  variables: dict[str, Any]  # State without gradients.
  statistics: dict[str, Any]  # Running statistics of the training itself.


class Program:
  """The functions of an experiment that are compiled; they are pure. `mesh` is the one in force."""

  def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh | None):
    self.experiment, self.mesh = experiment, mesh
    self.transformation = experiment.optimizer.make(experiment.steps)
    self.learning_rate = experiment.optimizer.learning_rate(experiment.steps)

  def init(self, key: jax.Array) -> State:
    """The state before the first update: the same bits on any mesh."""
    model: Any = self.experiment.model.make(key)
    return State(
      step=jnp.zeros((), jnp.int32),
      example=jnp.zeros((), jnp.uint32),
      model=model,
      optimizer=self.transformation.init(model),
      variables={},
      statistics={},
    )

  def step(self, state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    """One update, and its metrics as float32 scalars."""
    # Folding in a small number gives a key that `init` has split off: a branch beside those.
    steps = jax.random.fold_in(jax.random.key(self.experiment.seed), 2**32 - 1)
    key = jax.random.fold_in(steps, state.step)
    gradient, output = self.gradient(state.model, batch, key)
    updates, optimizer = self.transformation.update(gradient, state.optimizer, state.model)
    model = optax.apply_updates(state.model, updates)
    sums = {"loss": (output.loss_sum, output.weight)} | output.metrics
    metrics = {name: value / weight for name, (value, weight) in sums.items()}
    metrics |= {
      "weight": output.weight,
      "learning_rate": jnp.float32(self.learning_rate(state.step)),
      "gradient_norm": global_norm(gradient),
    }
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      example=state.example + jnp.uint32(jax.tree.leaves(batch)[0].shape[0]),
      model=model,
      optimizer=optimizer,
      variables=state.variables | output.variables,
    )
    return state, metrics

  def gradient(self, model, batch: dict[str, jax.Array], key) -> tuple[Any, Output]:
    """The gradient of the mean loss, and the sums over the batch.

    Microbatches add up sums, which are divided once: the result is that of the whole batch to
    rounding, also where microbatches hold different numbers of tokens.
    """

    def loss(model, batch, key):
      output = self.experiment.objective(model, batch, key)
      return output.loss_sum, output

    grad = jax.grad(loss, has_aux=True)
    n = self.experiment.microbatches
    if n == 1:
      total, output = grad(model, batch, key)
    else:
      # Rows m, m + n, m + 2n, ... form microbatch m: every device keeps the rows it has.
      split = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)
      parts = (jax.tree.map(split, batch), jax.random.split(key, n))

      def add(total, part):
        return jax.tree.map(jnp.add, total, grad(model, *part)), None

      first = jax.tree.map(lambda x: x[0], parts)
      zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, model, *first))
      (total, output), _ = jax.lax.scan(add, zeros, parts)
    weight = jnp.maximum(output.weight, 1e-9)  # A batch of padding alone moves nothing.
    return jax.tree.map(lambda g: g / weight.astype(g.dtype), total), output

  def abstract(self) -> State:
    """Shapes, dtypes and shardings of the state."""
    tree, mesh = jax.eval_shape(self.init, jax.random.key(0)), self.mesh
    if mesh is None:
      return tree
    spec = lambda x: x.sharding.spec if x.sharding else jax.P()  # Tracing gives constants none.
    place = lambda x: jax.sharding.NamedSharding(mesh, spec(x))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), tree)

  def compile_init(self):
    """Initialisation, compiled. On CPU it is not optimised: it runs once, for a moment."""
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "cpu":
      options["xla_backend_optimization_level"] = "0"
    return jax.jit(self.init).lower(jax.random.key(0)).compile(compiler_options=options)

  def compile_step(self, spec: dict[str, jax.ShapeDtypeStruct]):
    """The training step for batches of that spec, compiled; it donates the state.

    A batch of another shape is an error when it is called, never a silent recompilation.
    """
    place = sharding.batch_sharding()
    batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for k, s in spec.items()}
    return jax.jit(self.step, donate_argnums=0).lower(self.abstract(), batch).compile()


def train(
  experiment: Experiment,
  run_dir: str | os.PathLike,
  *,
  source: Path | None = None,
  quiet: bool = False,
  allow_changes: bool = False,
  profile: Profile | None = None,
  parts: Sequence[Part] = (),
) -> Run:
  """Trains, or goes on with what `run_dir` holds, until `experiment.steps` updates are done.

  Args:
    experiment: what to train; it is copied, so later changes to it do not matter.
    run_dir: the run directory; run_directory.py says what lies in it.
    source: the experiment's file, of which the run directory keeps a copy.
    quiet: no progress on the console.
    allow_changes: go on in `run_dir` also if it holds a run of another config.
    profile: which steps to trace.
    parts: called around each step, after the default ones.

  Returns:
    The run; `run.left` tells whether a signal ended it early.

  Raises:
    Refused: the experiment cannot run, here or in this directory.
  """
  experiment = copy.deepcopy(experiment)
  processes.initialize()
  validate(experiment, jax.device_count())
  enable_compilation_cache()
  directory = RunDirectory(run_dir, writes=processes.is_first())
  directory.begin(experiment, source, allow_changes=allow_changes)
  run = Run(experiment, directory, experiment.mesh.make() if jax.device_count() > 1 else None)
  run.parts = [*default_parts(profile), *parts]
  run.writers = default_writers(run, quiet=quiet)
  with run.in_mesh(), run.open():
    loop(run)
  return run


def loop(run: Run) -> None:
  """The training loop: from the state to go on from to the last step, or to a signal."""
  experiment, data = run.experiment, run.data
  program = Program(experiment, run.mesh)
  sizes = Sizes(experiment.batch, experiment.batch_stages)
  if (step := max(run.store.steps(), default=0)) >= experiment.steps:
    run.state = begin(run, program)
    run.say(f"{run.directory.path} has done its {experiment.steps} steps")
    return
  with run.away("data"):
    digest = data.digest()
    data.stage(step).batch(0, 1)
  run.directory.check_data(digest)
  processes.agree(config=dump(experiment), data=digest, step=step)
  run.state = begin(run, program)
  run.directory.drop_rows_after(step)
  example = int(run.state.example)
  feed = Feed(
    data, sizes, sharding.batch_sharding(), step=step, example=example, stop=experiment.steps
  )
  with feed:
    run.feed = feed
    compiled = {}
    for part in run.parts:
      part.start(run, step)
    while step < experiment.steps and not run.left:
      for part in run.parts:
        part.before_step(step)
      batch = next(feed)
      shapes = tuple(x.shape for x in batch.values())
      if shapes not in compiled:
        with run.away("compile", shapes=dict(zip(batch, shapes, strict=True))):
          compiled[shapes] = program.compile_step(data.stage(step).spec(sizes.at(step)))
      run.state, metrics = compiled[shapes](run.state, batch)
      step += 1
      for part in run.parts:
        part.after_step(step, metrics)


def begin(run: Run, program: Program) -> State:
  """The state to go on from: the newest checkpoint, else a fresh one.

  A fresh one may begin with another run's weights: those that were trained, not their average, with
  the optimizer's state made anew.
  """
  weights_from = run.experiment.weights_from
  if steps := run.store.steps():
    with run.away("restore", step=steps[-1]):
      return run.store.restore(steps[-1], program.abstract())
  with run.away("initialise"):
    state = program.compile_init()(jax.random.key(run.experiment.seed))
  if weights_from is not None:
    with run.away("weights", source=weights_from):
      path = RunDirectory(weights_from, writes=False).checkpoints
      model = checkpoint.newest(path, {"model": program.abstract().model})["model"]
      optimizer = jax.jit(program.transformation.init)(model)
      state = dataclasses.replace(state, model=model, optimizer=optimizer)
  return state


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that a restart does not compile again.

  The directory is this user's own: what lies in it is executed. JAX_COMPILATION_CACHE_DIR names
  another one.
  """
  if jax.config.values["jax_compilation_cache_dir"] is None:
    path = cache.root() / "compiled"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
