"""Writers: where a run's rows and texts go besides its directory."""

import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
  from bigtrain.run import Run


class Writer(Protocol):
  """Gets every row and every text, on the first process."""

  def row(self, step: int, kind: str, values: dict[str, float]) -> None: ...

  def text(self, step: int, prompt: str, text: str) -> None: ...

  def close(self) -> None: ...


class Console:
  """One line a row on standard error; on a terminal in colours."""

  def __init__(self, run: "Run"):
    from rich.console import Console as Rich

    self.rich = Rich(stderr=True, highlight=False, soft_wrap=True)
    self.steps = run.experiment.steps
    self.seconds = 0.0  # A step, without evaluation and saving.

  def row(self, step: int, kind: str, values: dict[str, float]) -> None:
    if kind != "train":
      shown = "  ".join(f"{name.split('/')[-1]} {v:.4g}" for name, v in values.items())
      self.rich.print(f"[bold]{kind} {step}[/]  {shown}")
      return
    self.seconds = values["step_seconds"]
    parts = [
      f"step [bold]{step}[/]/{self.steps}",
      f"loss [bold]{values['loss']:.4f}[/]",
      f"grad {values['gradient_norm']:.2f}",
      f"lr {values['learning_rate']:.2e}",
      f"{values['tokens_per_second']:,.0f} tok/s",
      *([f"mfu {values['mfu']:.1%}"] if "mfu" in values else []),
      *([f"waited {w:.1%}"] if (w := values["input_wait_seconds"] / self.seconds) > 0.01 else []),
      f"left {_duration(self.seconds * (self.steps - step))}",
    ]
    self.rich.print("  ".join(parts))

  def text(self, step: int, prompt: str, text: str) -> None:
    self.rich.print(f"[bold]{_plain(prompt)}[/]{_plain(text)}\n")

  def close(self) -> None:
    pass


class TensorBoard:
  """Event files in RUN/tensorboard. On resume, what lies past the restored step is hidden."""

  def __init__(self, run: "Run"):
    self.path, self.writer = os.fspath(run.directory.path / "tensorboard"), None

  def row(self, step: int, kind: str, values: dict[str, float]) -> None:
    for name, value in values.items():
      self._open(step).add_scalar(name if kind == "eval" else f"{kind}/{name}", value, step)

  def text(self, step: int, prompt: str, text: str) -> None:
    self._open(step).add_text("text", f"**{prompt}**{text}", step)

  def close(self) -> None:
    if self.writer is not None:
      self.writer.close()

  def _open(self, step: int):
    if self.writer is None:
      from tensorboardX import SummaryWriter

      self.writer = SummaryWriter(self.path, purge_step=step)
    return self.writer


def default_writers(run: "Run", *, quiet: bool) -> list[Writer]:
  """Those of every run; none but on the first process."""
  if not run.directory.writes:
    return []
  writers: list[Writer] = [] if quiet else [Console(run)]
  return writers + ([TensorBoard(run)] if run.experiment.logging.tensorboard else [])


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  return f"{days}d " * bool(days) + f"{hours}:{minutes:02}:{seconds:02}"


def _plain(text: str) -> str:
  from rich.markup import escape

  return escape(text)
