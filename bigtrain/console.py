"""Ways to tell people what goes on, on standard error and by the first process alone."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from bigtrain.secrets import redacted

MOMENT = 1.0  # Seconds; what takes no longer needs no word.

_bars = True


def say(text: str) -> None:
  """A line for people, also for those who want no progress."""
  if _is_first():
    print(f"bigtrain: {redacted(text)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def unless_quick(tell: Callable[[], None]) -> Iterator[None]:
  """Calls `tell`, from another thread, as soon as the body has taken more than a moment."""
  timer = threading.Timer(MOMENT, tell)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    timer.join()


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
  """Whether bars are shown in here; they are elsewhere."""
  global _bars
  before, _bars = _bars, shown
  try:
    yield
  finally:
    _bars = before


class Progress:
  """A bar over so many bytes, if that takes a while; nothing where nobody sees it move."""

  def __init__(self, title: str, total: int):
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (*progress.Progress.get_default_columns(), progress.TransferSpeedColumn())
    shown = _bars and console.is_terminal and _is_first()
    self._bar = progress.Progress(*columns, console=console, transient=True, disable=not shown)
    self._task = self._bar.add_task(title, total=total)
    self._shows = unless_quick(self._bar.start)

  def __enter__(self) -> "Progress":
    self._shows.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._shows.__exit__(*error)
    self._bar.stop()

  def advance(self, read: int) -> None:
    self._bar.advance(self._task, read)


def human(number: float) -> str:
  """Three digits and a letter: 124M for 124,439,808."""
  number = float(f"{number:.3g}")
  for unit in ("", "K", "M", "B"):
    if number < 1000:
      return f"{number:.3g}{unit}"
    number /= 1000
  return f"{number:,.3g}T"


def duration(seconds: float) -> str:
  """Such as 0:03:26, or 2d 7:00:00."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  return f"{days}d " * bool(days) + f"{hours}:{minutes:02}:{seconds:02}"


def _is_first() -> bool:
  if "jax" not in sys.modules:  # As in the preparation of data, which starts quicker without it.
    return True
  import jax

  # A process on its own needs no device to know that it is the first.
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def tables():
  """A console for tables on standard output; where that is a pipe or a file, a wide one."""
  from rich.console import Console

  wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
  return Console(width=wide)
