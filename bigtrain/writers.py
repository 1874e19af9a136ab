"""Writers: where a run's rows and texts go besides its directory."""

import contextlib
import math
import os
import shlex
import time
from typing import TYPE_CHECKING

from bigtrain.config import Refused
from bigtrain.console import duration, human, unless_quick
from bigtrain.data.feed import Sizes
from bigtrain.hints import command
from bigtrain.models.count import count_parameters

if TYPE_CHECKING:
  from bigtrain.run import Run


class Writer:
  """Gets every row and every text, and is told what goes on; on the first process alone."""

  def start(self, step: int) -> None:
    """Before anything is prepared; `step` updates are done already."""

  def phase(self, name: str) -> contextlib.AbstractContextManager:
    """Around what takes time and is no training: "data", "compile", "evaluate", "save", ..."""
    return contextlib.nullcontext()

  def row(self, step: int, kind: str, values: dict[str, float]) -> None: ...

  def text(self, step: int, prompt: str, text: str) -> None: ...

  def end(self) -> None:
    """When all steps are done and saved."""

  def close(self) -> None:
    """At the very end, also after an error."""


DOING = {
  "data": "preparing the data",
  "initialise": "initialising",
  "restore": "restoring the checkpoint",
  "weights": "loading the weights",
  "compile": "compiling",
  "evaluate": "evaluating",
  "sample": "sampling",
  "save": "saving",
}


class Console(Writer):
  """What the run is, one line a row, and what to do next, on standard error; in colours where that
  is a terminal."""

  def __init__(self, run: "Run"):
    from rich.console import Console as Rich

    self.run, self.steps = run, run.experiment.steps
    self.rich = Rich(stderr=True, highlight=False, soft_wrap=True)
    self.began = time.perf_counter()
    self.first: int | None = None  # How many steps earlier starts had done.
    self.last: dict[str, dict[str, float]] = {}  # The newest row of each kind.

  def start(self, step: int) -> None:
    self.first = step
    self.rich.print(f"[bold]{_plain(_shown(self.run.directory.path))}[/]")
    self._fact("model", f"{human(count_parameters(self.run.experiment.model))} parameters")
    self._fact("devices", _devices(self.run))
    if step:
      self._fact("resumed", f"going on from step {step} of {self.steps}")

  @contextlib.contextmanager
  def phase(self, name: str):
    with unless_quick(lambda: self.rich.print(f"[dim]{_plain(DOING.get(name, name))} ...[/]")):
      yield
    if name == "data":
      self._fact("data", self.run.data.about())
      self._fact("training", _amount(self.run))

  def row(self, step: int, kind: str, values: dict[str, float]) -> None:
    self.last[kind] = values
    if kind == "layers":  # Hundreds of numbers, which `diagnose` reads.
      return
    width = len(str(self.steps))
    if kind != "train":
      name = f"{kind} [bold]{step:>{width}}[/]{'':{width + 1}}"
      self.rich.print("  ".join([name, *_metrics(values)]))
      return
    parts = [
      f"step [bold]{step:>{width}}[/]/{self.steps}",
      f"loss [bold]{_loss(values)}[/]",
      f"grad {values['gradient_norm']:.2f}",
      f"lr {values['learning_rate']:.2e}",
    ]
    self.rich.print("  ".join(parts + self._speed(step, values)))

  def _speed(self, step: int, values: dict[str, float]) -> list[str]:
    """Rates and the time left, where they were measured."""
    if (seconds := values.get("step_seconds")) is None:
      return []
    units = {"tokens_per_second": "tok/s", "examples_per_second": "examples/s"}
    parts = [f"{values[name]:,.0f} {unit}" for name, unit in units.items() if name in values]
    parts += [f"mfu {values['mfu']:.1%}"] if "mfu" in values else []
    waited = values["input_wait_seconds"] / seconds
    parts += [f"waited {waited:.1%}"] if waited > 0.01 else []
    return [*parts, f"left {duration(seconds * (self.steps - step))}"]

  def text(self, step: int, prompt: str, text: str) -> None:
    from rich.text import Text

    whole = Text.assemble((_printable(prompt), "bold"), _printable(text))
    for line in whole.wrap(self.rich, max(self.rich.width - 8, 20)):
      line.rstrip()
      self.rich.print(Text("    ") + line)

  def end(self) -> None:
    if self.first is None:
      return
    done, seconds = self.steps - self.first, time.perf_counter() - self.began
    path = _shown(self.run.directory.path)
    aside = sorted(self.run.phases.items(), key=lambda item: -item[1])
    aside = [f"{name} {duration(seconds)}" for name, seconds in aside if seconds >= 1]
    self.rich.print(f"[bold]{_plain(path)}[/]")
    self._fact("done", f"{done:,} step{'s' * (done != 1)} in {duration(seconds)}")
    self._fact("of which", ", ".join(aside))
    if len((spent := self.run.account).attempts) > 1:
      whole = f"{duration(spent.wall)} over {len(spent.attempts)} starts"
      self._fact("goodput", f"{spent.goodput:.1%} of {whole} trained what was kept")
    self._fact("loss", f"{_loss(self.last['train'])} at the last step")
    self._fact("held out", "  ".join(_metrics(self.last.get("eval", {}))))
    self._fact("next", command(f"evaluate {shlex.quote(path)}"))
    self._fact("", self._sampling(path))

  def _sampling(self, path: str) -> str:
    """The command that samples from the run; nothing where it would be refused."""
    from bigtrain.generate import check_text

    prompt = next(iter(self.run.experiment.evaluation.prompts), "It was")
    try:
      check_text(self.run.weights, self.run.tokenizer, [prompt], 1)
    except Refused:
      return ""
    return command(f"sample {shlex.quote(path)} --prompt {shlex.quote(prompt)}")

  def _fact(self, name: str, text: str) -> None:
    if text:
      self.rich.print(f"  [dim]{name:<8}[/]  {_plain(text)}")


class TensorBoard(Writer):
  """Event files in RUN/tensorboard. On resume, what lies past the restored step is hidden."""

  def __init__(self, run: "Run"):
    self.path, self.writer = os.fspath(run.directory.path / "tensorboard"), None

  def start(self, step: int) -> None:
    from tensorboardX import SummaryWriter

    self.writer = SummaryWriter(self.path, purge_step=step + 1)

  def row(self, step: int, kind: str, values: dict[str, float]) -> None:
    assert self.writer is not None
    for name, value in values.items():
      if math.isfinite(value):
        self.writer.add_scalar(name if kind == "eval" else f"{kind}/{name}", value, step)

  def text(self, step: int, prompt: str, text: str) -> None:
    assert self.writer is not None
    self.writer.add_text("text", f"**{prompt}**{text}", step)

  def close(self) -> None:
    if self.writer is not None:
      self.writer.close()


def default_writers(run: "Run", *, quiet: bool) -> list[Writer]:
  """Those of every run; none but on the first process."""
  if not run.directory.writes:
    return []
  writers: list[Writer] = [] if quiet else [Console(run)]
  return writers + ([TensorBoard(run)] if run.experiment.logging.tensorboard else [])


def _devices(run: "Run") -> str:
  """Such as `8 cpu, data=2 fsdp=2 tensor=2`."""
  import jax

  text = f"{jax.device_count()} {jax.devices()[0].device_kind}"
  if (processes := jax.process_count()) > 1:
    text += f" of {processes} processes"
  axes = {} if run.mesh is None else run.mesh.shape
  sizes = " ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
  return f"{text}, {sizes}" if sizes else text


def _amount(run: "Run") -> str:
  """Steps, rows and tokens of the whole run; without the tokens where rows become longer."""
  e = run.experiment
  (_, length), (_, last) = run.batch_shape(0), run.batch_shape(e.steps - 1)
  sizes = [e.batch, *(size for _, size in e.batch_stages)]
  rows = f"{e.batch:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
  unit = "rows" if length else "examples"
  examples = Sizes(e.batch, e.batch_stages).between(0, e.steps)
  factors = f"{e.steps:,} steps x {rows} {unit}"
  if length is None or length != last:
    return f"{factors} = {human(examples)} {unit}"
  return f"{factors} x {length:,} tokens = {human(examples * length)} tokens"


def _loss(values: dict[str, float]) -> str:
  return f"{values['loss']:.4f}" if "loss" in values else "of no token"


def _metrics(values: dict[str, float]) -> list[str]:
  """`loss 1.23`, then the others, by the last part of their names."""
  short = {name.split("/")[-1].replace("_", " "): value for name, value in values.items()}
  names = sorted(short, key=lambda name: name != "loss")
  return [f"{name} {short[name]:.4g}" for name in names]


def _shown(path) -> str:
  """A path as people would type it here."""
  text = os.fspath(path)
  near = text if "://" in text else os.path.relpath(text)
  return text if near.startswith("..") else near


def _printable(text: str) -> str:
  """A model may say anything, also what a terminal obeys."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _plain(text: str) -> str:
  from rich.markup import escape

  return escape(text)
