"""Run: an experiment, its directory and its state; what training returns and a notebook holds."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from bigtrain import checkpoint, console, goodput, load, marks, processes, saved
from bigtrain.checkpoint import Store
from bigtrain.columns import Columns, columns
from bigtrain.config import Refused, nearest
from bigtrain.data.feed import Feed, Sizes
from bigtrain.experiment import Data, Experiment
from bigtrain.mesh import Mesh
from bigtrain.optim.average import averaged
from bigtrain.phases import enter, within
from bigtrain.program import Program, enable_compilation_cache
from bigtrain.run_directory import RunDirectory
from bigtrain.secrets import redacted
from bigtrain.state import State, combine
from bigtrain.validate import check_mesh

if TYPE_CHECKING:
  from bigtrain.data.tokenizers import Tokenizer
  from bigtrain.parts import Part
  from bigtrain.writers import Writer


class Back(NamedTuple):
  """Where a run has to go on from after a fault (incidents.py)."""

  fault: int  # The step that was one.
  to: int  # The completed steps of the state to go on from.
  example: int  # From which on it gets data.


class OnMesh:
  """A model whose calls run on its mesh, so that whoever calls it need not know of one."""

  def __init__(self, model, mesh: jax.sharding.Mesh):
    self._model, self._mesh = model, mesh

  def __call__(self, *args, **kwargs):
    with jax.set_mesh(self._mesh):
      return self._model(*args, **kwargs)

  def __getattr__(self, name: str):
    return getattr(self._model, name)

  def __repr__(self) -> str:
    return repr(self._model)


class Run:
  """One run, live or loaded."""

  feed: Feed  # While it trains.
  store: Store  # While it trains.
  back_to: Back | None = None
  started: bool = False  # Its parts have been.
  left: bool = False  # A signal asked it to leave; its state is one step past what it saved.
  account: goodput.Account  # Of its time; once it has ended or left.

  def __init__(
    self, experiment: Experiment, directory: RunDirectory, mesh: jax.sharding.Mesh | None
  ):
    self.experiment, self.directory, self.mesh = experiment, directory, mesh
    self.began = time.perf_counter()
    self.parts: list[Part] = []
    self.leaves: list[jax.Array] = []  # Of the state, as the compiled step takes them.
    self.writers: list[Writer] = []  # Where records go besides the run directory.
    self.phases: dict[str, float] = {}  # Seconds of what was not training.

  def __repr__(self) -> str:
    said, losses = [str(self.directory.path)], self.metrics.get("loss")
    if self.leaves:
      size = sum(leaf.size for leaf in jax.tree.leaves(self.state.model))
      said.append(f"step {self.state.step} of {self.experiment.steps}, {size:,} parameters")
    if losses is not None:
      said.append(f"last loss {losses[-1]:.4f}")
    return f"<Run {', '.join(said)}>"

  @property
  def sizes(self) -> Sizes:
    """The rows of the batch at each step."""
    return Sizes(self.experiment.batch, self.experiment.batch_stages)

  @functools.cached_property
  def data(self) -> Data:
    return self.experiment.data.make(self.experiment.seed)

  @functools.cached_property
  def tokenizer(self) -> "Tokenizer":
    """What turns text into tokens and back: what the directory keeps, else the data's."""
    kept = self.experiment.data.read_tokenizer(self.directory.tokenizer)
    return self.data.tokenizer if kept is None else kept

  @property
  def state(self) -> State:
    """All that is trained; the loop replaces it at each step."""
    return jax.tree.unflatten(self._structure, self.leaves)

  @state.setter
  def state(self, state: State) -> None:
    self.leaves, self._structure = jax.tree.flatten(state)

  @property
  def weights(self) -> Any:
    """The module to evaluate and sample with: averaged weights, where the optimizer keeps them.

    Its products are low where those of training are.
    """
    state = self.state
    module = combine(averaged(state.optimizer, state.model), state.variables)
    seen = state.statistics.get("amax", {})
    return marks.low(self.experiment.products, module, marks.largest(seen))

  @property
  def model(self):
    """The module, to be called: `run.model(tokens_BT)` gives logits, on the run's mesh."""
    return self.weights if self.mesh is None else OnMesh(self.weights, self.mesh)

  @property
  def metrics(self) -> Columns:
    """The rows of metrics.jsonl as arrays by name: one entry for each logged step."""
    return columns(self.directory.rows("train"))

  @property
  def evaluations(self) -> Columns:
    """The same for evaluations: `evaluations["eval/validation/loss"]` at `evaluations["step"]`."""
    return columns(self.directory.rows("eval"))

  @property
  def layers(self) -> Columns:
    """Statistics of every layer: `layers["gradient/transformer.03.attention"]` at `layers["step"]`.

    `gradient`, `parameter` and `update` are root mean squares; layers report more (taps.py).
    """
    return columns(self.directory.rows("layers"))

  def evaluate(self) -> dict[str, float]:
    """Metrics of the weights on the held-out split."""
    from bigtrain.evaluate import Evaluator

    with self.in_mesh():
      return Evaluator(self).metrics()

  def sample(self, prompt: str = "", *, tokens: int = 200, samples: int = 1, **sampling):
    """Continuations of a prompt, a list of texts; `sampling` are the fields of Sampling."""
    from bigtrain.generate import Sampling, generate_text

    if samples < 1:
      raise Refused(f"samples is {samples}; give 1 or more")
    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := sorted(sampling.keys() - set(known)):
      raise Refused(f"sample has no setting {unknown[0]!r}{nearest(unknown[0], known)}")
    with self.in_mesh():
      return generate_text(
        self.weights, self.tokenizer, [prompt] * samples, tokens, Sampling(**sampling)
      )

  def in_mesh(self):
    """A context in which the run's mesh, if it has one, is in force."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def batch_shape(self, step: int) -> tuple[int, int | None]:
    """Rows of the batch that update `step` (from 0) consumes; tokens of a row, None without any."""
    rows = self.sizes.at(step)
    if not self.experiment.data.row_length():
      return rows, None
    spec = self.data.stage(step).spec(rows)
    return rows, next(iter(spec.values())).shape[1]

  def record(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Writes a row to metrics.jsonl and to whoever else wants it; on the first process only."""
    if self.directory.writes:
      self.directory.row(step, kind, values)
      for writer in self.writers:
        writer.row(step, kind, values)

  def text(self, step: int, prompt: str, text: str) -> None:
    """Records a continued prompt."""
    if self.directory.writes:
      self.directory.event("text", step=step, prompt=prompt, text=text)
      for writer in self.writers:
        writer.text(step, prompt, text)

  def say(self, text: str) -> None:
    """Tells people, also those who want no progress on the console; on the first process only."""
    if self.directory.writes:
      console.say(text)

  def tell_saves(self) -> None:
    """Records which saves have been verified."""
    for event in self.store.news():
      self.directory.event(**event)

  def tell_damaged(self, step: int, why: str) -> None:
    """Records that a checkpoint was set aside."""
    self.directory.event("damaged", step=step, why=why)
    self.say(f"{why}; it is set aside, in {self.directory.checkpoints / checkpoint.DAMAGED}")

  def seconds_away(self) -> float:
    """Seconds that went to anything but training, so far."""
    return sum(self.phases.values())

  @contextlib.contextmanager
  def away(self, phase: str, **fields) -> Iterator[None]:
    """Marks time that is not training: counted by phase, and an event says how long it was."""
    if self.started:
      with within("step"):
        jax.block_until_ready(self.leaves[0])  # What was dispatched before is training.
      for part in self.parts:
        part.on_away(phase)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
      for writer in self.writers:
        stack.enter_context(writer.phase(phase))
      stack.enter_context(within(phase))
      yield
    seconds = time.perf_counter() - started
    self.phases[phase] = self.phases.get(phase, 0.0) + seconds
    self.directory.event(phase, **fields, seconds=round(seconds, 3))

  @contextlib.contextmanager
  def open(self) -> Iterator[None]:
    """Opens the checkpoints, and in the end waits for them; closes the parts and the records.

    Also when training fails, which it records.
    """
    try:
      mesh = {} if self.mesh is None else {a: n for a, n in self.mesh.shape.items() if n > 1}
      self.directory.event(
        "start",
        processes=jax.process_count(),
        devices=jax.device_count(),
        mesh=mesh,
        microbatches=self.experiment.microbatches,
        seconds=round(time.perf_counter() - self.began, 3),
      )
      with Store(self.directory.checkpoints, self.experiment.checkpoints) as self.store:
        yield
        enter("save")  # Until all that was saved is verified.
        # All end alike: one that is started again alone would never meet the others.
        with processes.together("the last save"):
          self.store.wait()
        self.tell_saves()
      self.account = goodput.close(self.directory, "left" if self.left else "end")
      for writer in () if self.left else self.writers:
        writer.end()
    except BaseException as error:
      with contextlib.suppress(OSError):  # A full disk, say, of which `error` tells.
        self.directory.event("error", error=redacted(f"{type(error).__name__}: {error}")[:2000])
      raise
    finally:
      with contextlib.ExitStack() as stack:
        stack.callback(self.directory.close)
        for part in (*self.writers, *self.parts):
          stack.callback(part.close)


def load_run(run_dir: str | os.PathLike, step: int | None = None) -> Run:
  """The run in a directory, with the weights of its newest checkpoint (or of `step`).

  It is on the mesh that trained it if that fits the devices that are here, else sharded over all of
  them, else replicated, else (where not even a batch can be shared out) on one device.

  Raises:
    Refused: the directory holds no run, or no checkpoint yet.
  """
  processes.initialize()
  enable_compilation_cache()
  experiment, _ = load.read(run_dir)
  directory = RunDirectory(run_dir, writes=False)
  mesh = _fitting_mesh(experiment)
  run = Run(experiment, directory, mesh)
  with run.in_mesh():
    abstract = Program(experiment, mesh).abstract()
    run.state = saved.newest(directory.checkpoints, abstract, step)
  return run


def _fitting_mesh(experiment: Experiment) -> jax.sharding.Mesh | None:
  if jax.device_count() == 1:
    return None
  for mesh in (experiment.mesh, Mesh(), Mesh(data=-1, fsdp=1)):
    try:
      check_mesh(dataclasses.replace(experiment, mesh=mesh), jax.device_count())
    except Refused:
      continue
    return mesh.make()
  return None
