"""What people are told beside the lines of a run, and when."""

import io
import sys
import threading
import time

import jax
import pytest

from bigtrain import console
from bigtrain.console import Progress, bars, duration, human, say, unless_quick


@pytest.mark.parametrize(
  ("number", "text"),
  [
    *[(0, "0"), (512, "512"), (20_480, "20.5K"), (1_150_000, "1.15M"), (999_999, "1M")],
    *[(124_439_808, "124M"), (8_030_261_248, "8.03B"), (15e12, "15T"), (4e15, "4e+03T")],
  ],
)
def test_large_numbers_have_three_digits(number, text):
  assert human(number) == text


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.4, "0:00:00"), (59.6, "0:01:00"), (206, "0:03:26"), (2**18, "3d 0:49:04")],
)
def test_durations_are_clock_times(seconds, text):
  assert duration(seconds) == text


def test_what_is_over_in_a_moment_is_not_told(monkeypatch):
  monkeypatch.setattr(console, "MOMENT", 0.05)
  told = threading.Event()
  with unless_quick(told.set):
    pass
  time.sleep(0.1)
  assert not told.is_set()
  with unless_quick(told.set):
    assert told.wait(5)  # While it lasts, not after.


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def terminal(monkeypatch) -> Terminal:
  """A terminal on standard error: from within a test, for pytest captures each phase anew."""
  for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(sys, "stderr", screen := Terminal())
  return screen


def hash_for(seconds: float) -> None:
  with Progress("hashing", 100) as progress:
    progress.advance(50)
    time.sleep(seconds)


def test_a_bar_is_shown_where_the_work_takes_longer_than_a_moment(monkeypatch):
  screen = terminal(monkeypatch)
  hash_for(0.0)
  assert screen.getvalue() == ""
  monkeypatch.setattr(console, "MOMENT", 0.01)
  with bars(shown=False):
    hash_for(0.1)
  assert screen.getvalue() == ""
  hash_for(0.3)
  assert "hashing" in screen.getvalue() and "50%" in screen.getvalue()


def test_a_process_that_is_not_the_first_tells_nothing(monkeypatch):
  screen = terminal(monkeypatch)
  monkeypatch.setattr(console, "MOMENT", 0.01)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  say("waiting")
  hash_for(0.1)
  assert screen.getvalue() == ""
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  say("waiting")
  assert screen.getvalue() == "bigtrain: waiting\n"
