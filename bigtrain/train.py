"""Training: the loop that calls the compiled step. Read it from top to bottom.

What happens around the step (evaluation, checkpoints, logs, profiles, signals) are parts; the loop
just calls them.
"""

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bigtrain import checkpoint, console, goodput, preflight, processes, sharding, weights
from bigtrain.checkpoint import NothingWhole
from bigtrain.config import dump
from bigtrain.data.feed import Feed
from bigtrain.elastic import begun_on, fitted
from bigtrain.experiment import Experiment
from bigtrain.fit import check_fit
from bigtrain.hints import either
from bigtrain.parts import Part, default_parts
from bigtrain.phases import stepped, within
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
  restart: bool = False,
  elastic: bool = False,
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
    restart: begin again at step 0 if no checkpoint in `run_dir` is whole.
    elastic: go on also with other devices than the run began on (elastic.py).
    parts: called around each step, after the default ones.

  Returns:
    The run; `run.left` tells whether a signal ended it early.

  Raises:
    Refused: the experiment cannot run, here or in this directory.
    CheckFailed: what a checkpoint goes on with is not what it was (replay.py).
  """
  began, experiment = time.perf_counter(), copy.deepcopy(experiment)
  processes.initialize()
  directory, asked = RunDirectory(run_dir, writes=processes.is_first()), experiment
  preflight.check_devices(elastic and begun_on(experiment, directory.events()) is not None)
  if elastic:
    experiment = fitted(experiment, directory.events())
  validate(experiment, jax.device_count())
  run = Run(experiment, directory, experiment.mesh.make() if jax.device_count() > 1 else None)
  run.began = began
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
    as_asked = dataclasses.replace(experiment, mesh=asked.mesh, microbatches=asked.microbatches)
    with processes.together("the run directory"):
      directory.begin(as_asked, source, allow_changes=allow_changes)
    for remark in told:
      directory.event("preflight", told=remark)
      run.say(remark)
    run.parts = [*default_parts(), *parts]
    run.writers = default_writers(run, quiet=quiet)
    with console.bars(not quiet), run.in_mesh(), run.open():
      while loop(run, restart=restart):
        pass
  return run


def loop(run: Run, *, restart: bool = False) -> bool:
  """The training loop: from the state to go on from to the last step, or to a signal.

  Returns:
    Whether it is to begin again, from an earlier state, after a fault (incidents.py).
  """
  experiment = run.experiment
  program = Program(experiment, run.mesh)
  if (step := begin(run, program, restart=restart)) >= experiment.steps:
    run.say(f"{run.directory.path} has done its {experiment.steps} steps; nothing is left to do")
    return False
  if run.left:  # The same command will go on from that earlier state.
    return False
  for remark in remarks(experiment):
    run.say(remark)
  for writer in run.writers:
    writer.start(step)
  check_data(run, step)
  goodput.resume(run.directory, step)
  feed = Feed(
    run.data,
    run.sizes,
    sharding.batch_sharding(),
    step=step,
    example=int(run.state.example),
    stop=experiment.steps,
  )
  stepped(step)
  with feed, within("loop"):
    run.feed = feed
    update = Update(run, program)
    for part in run.parts:
      part.start(run, step)
    run.started = True
    while step < experiment.steps and not run.left and run.back_to is None:
      for part in run.parts:
        part.before_step(step)
      metrics = update(step)
      stepped(step := step + 1)
      for part in run.parts:
        part.after_step(step, metrics)
    if run.left and run.back_to is None:
      metrics = update(step)
      for part in run.parts:
        part.on_leave(step, metrics)
  return run.back_to is not None


def begin(run: Run, program: Program, *, restart: bool) -> int:
  """Gives the run the state to go on from: the newest checkpoint that is whole, else a fresh one.

  A fresh one may begin with other weights (weights.py), with the optimizer's state made anew.

  Returns:
    How many steps it has completed.

  Raises:
    NothingWhole: of what it saved nothing is, and `restart` is False.
  """
  like, source = program.abstract(), run.experiment.weights_from
  back = run.back_to
  with run.away("restore"):
    found = run.store.newest(like, run.tell_damaged, until=back and back.to)
  if found is not None:
    return go_on(run, *found)
  with processes.together("the checkpoints"):
    if processes.is_first() and not restart and run.directory.has_saved():
      raise NothingWhole(
        f"{run.directory.path} has had checkpoints and none is whole: put one back into "
        f"{run.store.path} (what was found damaged is under {checkpoint.DAMAGED}/ there), or begin "
        f"again at step 0: {either('restart', 'restart=True')}"
      )
  if source is not None:
    weights.check_source(source)
  with run.away("initialise"):
    state = program.compile_init()(jax.random.key(run.experiment.seed))
  if source is not None:
    with run.away("weights", source=source):
      first, told = weights.load(
        source, state, run.experiment.new_weights, run.data.tokenizer_json()
      )
      optimizer = jax.jit(program.transformation.init)(widened(first["model"]))
      state = dataclasses.replace(state, **first, optimizer=optimizer)
    for line in told:
      run.directory.event("weights_told", told=line)
      run.say(line)
  return go_on(run, 0, state)


def go_on(run: Run, step: int, state: State) -> int:
  """Gives the run that state of `step`, with other data than its own where some are left out."""
  back, run.back_to = run.back_to, None
  if back is not None:
    run.directory.event("rollback", step=back.fault, to=step, example=back.example)
    run.directory.skip(step, back.example)
    run.say(f"going on from step {step}, with the data from example {back.example:,} on")
  skipped_to = back.example if back is not None else run.directory.skipped_to(step)
  if skipped_to is not None:
    example = jax.device_put(np.uint32(skipped_to), state.example.sharding)
    state = dataclasses.replace(state, example=example)
  run.state = state
  return step


def check_data(run: Run, step: int) -> None:
  """Reads a first row, and refuses data that are not those which the run began with."""
  with run.away("data"), processes.together("the data"):
    digest = run.data.digest()
    run.data.stage(step).batch(0, 1)
  run.directory.check_data(digest)
  run.directory.keep_tokenizer(run.data.tokenizer_json())
  if (found := run.data.kept_out()) is not None:
    run.directory.event("kept_out", found=found)
    run.say(found)
  processes.agree(data=digest, step=step)


class Update:
  """One update of the run's state by the next batch; each program is compiled when it is needed."""

  def __init__(self, run: Run, program: Program):
    self.run, self.program = run, program
    self.compiled: dict[tuple, Any] = {}

  def __call__(self, step: int) -> dict[str, Any]:
    """The metrics of the update that follows `step` completed ones."""
    run, every = self.run, self.run.experiment.logging.layers_every
    batch = next(run.feed)
    statistics = every > 0 and (step + 1) % every == 0
    shapes = tuple(x.shape for x in batch.values())
    if (key := (statistics, shapes)) not in self.compiled:
      with run.away("compile", shapes=dict(zip(batch, shapes, strict=True))):
        spec = run.data.stage(step).spec(shapes[0][0])
        self.compiled[key] = self.program.compile_step(spec, statistics=statistics)
    with within("step"):
      run.leaves, metrics = self.compiled[key](run.leaves, batch)
    return metrics
