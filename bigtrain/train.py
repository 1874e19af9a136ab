"""Training: the loop that calls the compiled step. Read it from top to bottom.

What happens around the step (evaluation, checkpoints, logs, profiles, signals) are parts; the loop
just calls them.
"""

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from bigtrain import console, preflight, processes, sharding, weights
from bigtrain.config import dump
from bigtrain.data.feed import Feed, Sizes
from bigtrain.experiment import Experiment
from bigtrain.fit import check_fit
from bigtrain.parts import Part, default_parts
from bigtrain.program import Program, enable_compilation_cache
from bigtrain.run import Run
from bigtrain.run_directory import RunDirectory
from bigtrain.state import State
from bigtrain.stored import widened
from bigtrain.validate import remarks, validate
from bigtrain.writers import default_writers


def train(
  experiment: Experiment,
  run_dir: str | os.PathLike,
  *,
  source: Path | None = None,
  quiet: bool = False,
  allow_changes: bool = False,
  parts: Sequence[Part] = (),
) -> Run:
  """Trains, or goes on with what `run_dir` holds, until `experiment.steps` updates are done.

  Args:
    experiment: what to train; it is copied, so later changes to it do not matter. Its epochs
      become steps.
    run_dir: the run directory; run_directory.py says what lies in it.
    source: the experiment's file, of which the run directory keeps a copy.
    quiet: no progress on the console.
    allow_changes: go on in `run_dir` also if it holds a run of another config.
    parts: called around each step, after the default ones.

  Returns:
    The run; `run.left` tells whether a signal ended it early.

  Raises:
    Refused: the experiment cannot run, here or in this directory.
  """
  experiment = copy.deepcopy(experiment)
  processes.initialize()
  validate(experiment, jax.device_count())
  directory = RunDirectory(run_dir, writes=processes.is_first())
  run = Run(experiment, directory, experiment.mesh.make() if jax.device_count() > 1 else None)
  told = preflight.check(directory.path)
  with run.in_mesh():
    check_fit(experiment, run.data)
  if experiment.epochs is not None:
    examples = experiment.epochs * run.data.examples()
    experiment.steps, experiment.epochs = math.ceil(examples / experiment.batch), None
    validate(experiment)
  processes.agree(config=dump(experiment))
  enable_compilation_cache()
  with contextlib.closing(directory):
    with preflight.together("the run directory"):
      directory.begin(experiment, source, allow_changes=allow_changes)
    for remark in told:
      directory.event("preflight", told=remark)
      run.say(remark)
    run.parts = [*default_parts(), *parts]
    run.writers = default_writers(run, quiet=quiet)
    with console.bars(not quiet), run.in_mesh(), run.open():
      loop(run)
  return run


def loop(run: Run) -> None:
  """The training loop: from the state to go on from to the last step, or to a signal."""
  experiment = run.experiment
  program = Program(experiment, run.mesh)
  sizes = Sizes(experiment.batch, experiment.batch_stages)
  if (step := max(run.store.steps(), default=0)) >= experiment.steps:
    run.state = begin(run, program)
    run.say(f"{run.directory.path} has done its {experiment.steps} steps; nothing is left to do")
    return
  if not step and experiment.weights_from is not None:
    weights.check_source(experiment.weights_from)
  for remark in remarks(experiment):
    run.say(remark)
  for writer in run.writers:
    writer.start(step)
  with run.away("data"), preflight.together("the data"):
    data = run.data
    digest = data.digest()
    data.stage(step).batch(0, 1)
  run.directory.check_data(digest)
  run.directory.keep_tokenizer(data.tokenizer_json())
  if (found := data.kept_out()) is not None:
    run.directory.event("kept_out", found=found)
    run.say(found)
  processes.agree(data=digest, step=step)
  run.state = begin(run, program)
  run.directory.drop_rows_after(step)
  example = int(run.state.example)
  feed = Feed(
    data, sizes, sharding.batch_sharding(), step=step, example=example, stop=experiment.steps
  )
  with feed:
    run.feed = feed
    compiled, layers_every = {}, experiment.logging.layers_every
    for part in run.parts:
      part.start(run, step)
    while step < experiment.steps and not run.left:
      for part in run.parts:
        part.before_step(step)
      batch = next(feed)
      statistics = layers_every > 0 and (step + 1) % layers_every == 0
      shapes = tuple(x.shape for x in batch.values())
      if (key := (statistics, shapes)) not in compiled:
        with run.away("compile", shapes=dict(zip(batch, shapes, strict=True))):
          spec = data.stage(step).spec(sizes.at(step))
          compiled[key] = program.compile_step(spec, statistics=statistics)
      run.leaves, metrics = compiled[key](run.leaves, batch)
      step += 1
      for part in run.parts:
        part.after_step(step, metrics)


def begin(run: Run, program: Program) -> State:
  """The state to go on from: the newest checkpoint, else a fresh one.

  A fresh one may begin with other weights (weights.py), with the optimizer's state made anew.
  """
  if steps := run.store.steps():
    with run.away("restore", step=steps[-1]):
      return run.store.restore(steps[-1], program.abstract())
  with run.away("initialise"):
    state = program.compile_init()(jax.random.key(run.experiment.seed))
  if (source := run.experiment.weights_from) is not None:
    with run.away("weights", source=source):
      found, told = weights.load(
        source, state, run.experiment.new_weights, run.data.tokenizer_json()
      )
      optimizer = jax.jit(program.transformation.init)(widened(found["model"]))
      state = dataclasses.replace(state, **found, optimizer=optimizer)
    for line in told:
      run.directory.event("weights_told", told=line)
      run.say(line)
  return state
