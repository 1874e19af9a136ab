"""The watchdog: no phase of a run lasts for ever, and who keeps the others waiting is named.

A thread looks once a moment at what the main thread does (phases.py) and for how long. When the
limit of that phase has passed on any process, every process writes the stacks of all its threads to
RUN/hangs/, the first one writes an event that says who is missing and where, and all leave with
exit code 5, so that a supervisor restarts them. As long as another process is at work within its
own limit, the time of one that waits has not begun (heartbeats.py).

Two things need more than a thread of Python's. Code that holds Python's lock stops this thread too:
then faulthandler, whose timer is a thread of C, writes the stacks to standard error and leaves with
code 1. And a process that is stopped does nothing at all: it is missed by process 0, to which all
send heartbeats (heartbeats.py), or by its supervisor (supervise.py).
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from bigtrain import hangs
from bigtrain.deadlines import Deadlines, limit, setting
from bigtrain.exit_codes import Exit
from bigtrain.heartbeats import MAY_WAIT, Beat, Ending, Heart, latecomers, missing, stragglers
from bigtrain.lines import add_event
from bigtrain.phases import doing, enter

TICK = 0.25  # Seconds between looks.
PATIENCE = 20.0  # Seconds that writing a report may take, then the process leaves without it.
GRACE = 5.0  # Seconds to end by itself for a process that hears that another one failed.
T = TypeVar("T")
AGAIN = 600.0  # Seconds before a straggler is named again.
STDERR = 2  # Whatever stands for sys.stderr.
WINDOW = 20  # Steps over which processes are compared.
Line = Callable[[dict[str, Any]], None]


class Watchdog:
  """Watches the main thread of this process.

  Args:
    deadlines: of its phases.
    run_dir: where the run is recorded.
    line: tells a supervisor how it is (supervise.py).
  """

  def __init__(self, deadlines: Deadlines, run_dir: str | os.PathLike, line: Line | None = None):
    self.deadlines, self.run_dir, self.line = deadlines, run_dir, line
    self.heart: Heart | None = None
    self.text = ""  # What went wrong, if something did.
    self.code: int | None = None  # With which the process ends, when that is known.
    self._heard: float | None = None  # When it heard that another one ended.
    self._excused = (0.0, 0.0)  # Since when, and the seconds of that in which nothing ran here.
    self._stopped, self._ends = threading.Event(), threading.Lock()
    self._named: dict[int, float] = {}  # Stragglers, and when they were named.
    self._compared: dict[int, Beat] = {}
    if not faulthandler.is_enabled():
      faulthandler.enable(STDERR)  # Stacks also where a library ends the process by a signal.
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._thread.start()

  def stop(self) -> None:
    self._stopped.set()
    self._thread.join()
    if self.heart is not None:
      self.heart.stop()
    faulthandler.cancel_dump_traceback_later()

  def leave(self, code: int) -> None:
    """Limits what follows until this process has ended.

    In trouble jax would wait for the others, and they for this process: then it tells them and
    ends here. What ended it may be that another one is gone, whose trouble then is that of all.
    """
    if code in (Exit.DONE, Exit.LEFT):
      self.code = code
      return
    if self.heart is None:
      hangs.leave(code)  # A library's thread that still writes would abort an orderly end.
    ending = own = Ending(self.heart.process, code, self.text)
    answers = self.heart.hears()  # Not where process 0 is stopped: whoever asks then waits.
    if answers:
      ending = _bounded(PATIENCE, self.heart.announce, own) or own
    if ending.process == own.process:
      self._ends.acquire(timeout=PATIENCE)
      if answers:
        _bounded(PATIENCE, self.heart.goodbye, PATIENCE)
      hangs.leave(code)
    self._end(ending.code, f"{ending}; here {self.text}")

  def _watch(self) -> None:
    last, told = time.monotonic(), 0.0
    while not self._stopped.wait(TICK):
      now = time.monotonic()
      if now - last - TICK > 1:
        self._excuse(last + TICK, now)
      last = now
      if self.heart is None:
        self.heart = self._join()
      if now - told > 1:
        self._tell()
        told = now
      if (found := self._trouble(now)) is not None:
        self._end(*found)
      if self.heart is not None and self.heart.process == 0:
        self._name_stragglers(self.heart, now)

  def _excuse(self, stopped: float, now: float) -> None:
    """A process that was stopped and goes on, as in a laptop's sleep, did not hang meanwhile."""
    since = doing.since
    before = self._excused[1] if self._excused[0] == since else 0.0
    self._excused = since, before + now - max(stopped, since)  # It may have got on already.

  def _trouble(self, now: float) -> tuple[int, str] | None:
    """Why this process has to end now, with its exit code; None if all is well."""
    phase, since = doing.name, doing.since
    seconds = now - since - self._excused[1] * (self._excused[0] == since)
    if self.heart is not None and phase in MAY_WAIT:
      seconds = min(seconds, now - self.heart.at_work)
    most = limit(self.deadlines, phase, doing.median())
    if most and seconds > most:
      if phase == "end" and self.code is not None:
        return self.code, f"waited {seconds:.0f} s for the end of other processes"
      about = f"{most:.0f} s (--deadlines.{setting(phase)})"
      return Exit.DEADLINE, f"{phase} has lasted {seconds:.0f} s, and its limit is {about}"
    if self.heart is None or (phase == "end" and self.code is None):
      return None
    if (ending := self.heart.ending) is not None:
      self._heard = self._heard or now
      if ending.code == Exit.DEADLINE or now - self._heard > GRACE:
        return ending.code, str(ending)
      return None
    if phase != "end" and (most := self.deadlines.silence):
      about = f"for {most:.0f} s (--deadlines.silence)"
      if self.heart.process and now - self.heart.heard > most:
        return Exit.DEADLINE, f"process 0 has not been heard of {about}"
      silent = [p for p, beat in self.heart.beats().items() if beat.silent > most]
      if self.heart.process == 0 and silent:
        return Exit.DEADLINE, f"process {', '.join(map(str, silent))} has not been heard of {about}"
    return None

  def _end(self, code: int, text: str) -> None:
    """Reports what is wrong and ends the process, also where nothing can be written."""
    self._ends.acquire(timeout=PATIENCE)  # One thread of this process ends it.
    _bounded(PATIENCE, self._report, code, text)
    if self.heart is not None and self.heart.hears():
      _bounded(PATIENCE, self.heart.goodbye, PATIENCE)
    hangs.leave(code)

  def _report(self, code: int, text: str) -> None:
    hangs.say(self._number(), text)
    if self.code is not None:
      return
    heart, beats, lost = self.heart, {}, []
    if heart is not None:
      beats = heart.beats() if heart.process == 0 else {}
      lost = missing(beats, heart.soon) if heart.hears() else [0]
    if code == Exit.DEADLINE:
      with contextlib.suppress(OSError):  # A full disk must not keep the others from hearing.
        hangs.write(self.run_dir, self._number(), text, beats, lost)
    if heart is not None and heart.hears():
      heart.announce(Ending(heart.process, code, text))
    if self._number() == 0:
      if code == Exit.DEADLINE:
        seconds, where = time.monotonic() - doing.since, {str(p): str(beats[p]) for p in lost}
        about = {"phase": doing.name, "seconds": round(seconds, 1), "missing": lost, "where": where}
        self._event("hang", **about, cause=text)
      elif code == Exit.LEFT:
        self._event("left", cause=text)
      else:
        self._event("error", error=text)

  def stop_all(self) -> None:
    """Tells the others that this process stops at once, having nothing to save."""
    if self.heart is not None:
      ending = Ending(self.heart.process, Exit.LEFT, "stopped at once")
      _bounded(2.0, self.heart.announce, ending)

  def _number(self) -> int:
    return self.heart.process if self.heart is not None else 0

  def _event(self, name: str, **fields) -> None:
    with contextlib.suppress(OSError):
      add_event(self.run_dir, name, **fields)

  def _name_stragglers(self, heart: Heart, now: float) -> None:
    """An event for each process that keeps the others waiting, once in a while."""
    beats, usual = heart.beats(), doing.median()
    found = list(latecomers(beats, max(2 * heart.every, 3 * usual)))
    least = min(beat.step for beat in beats.values())
    if least >= min((b.step for b in self._compared.values()), default=0) + WINDOW:
      found += stragglers(self._compared, beats, usual)
      self._compared = beats
    for late in found:
      if now - self._named.get(late.process, -AGAIN) >= AGAIN and doing.name != "end":
        self._named[late.process] = now
        seconds = round(late.seconds, 3)
        about = {"process": late.process, "seconds": seconds, "why": late.why}
        _bounded(PATIENCE, self._event, "straggler", **about)  # The disk may hang too.
        hangs.say(late.process, f"keeps the others waiting: {late.why}")

  def _join(self) -> Heart | None:
    """The heart of this process, once it has met the others; None if there are none."""
    if (room := _processes()) is None or (found := room.coordination()) is None:
      return None
    client, process, processes = found
    heart = Heart(client, process, processes, self.deadlines)
    heart.start()
    return heart

  def _tell(self) -> None:
    """Sends a sign of life to the supervisor, if there is one, and holds off what ends it."""
    if self.deadlines.silence and self.heart is not None:
      faulthandler.dump_traceback_later(self.deadlines.silence, exit=True, file=STDERR)
    if self.line is not None:
      room = _processes()
      process = room.number() if room is not None else None
      about = {"step": doing.step, "first": doing.first, "phase": doing.name}
      self.line(about | {"process": process, "dir": os.fspath(self.run_dir)})


def _processes() -> ModuleType | None:
  """The room of that name once it is there: it imports jax, which takes its time."""
  return sys.modules.get("bigtrain.processes")


def _bounded(seconds: float, function: Callable[..., T], /, *args, **fields) -> T | None:
  """Calls a function that may never return; what it returned in that time, else None."""
  found: list[T] = []
  work = lambda: found.append(function(*args, **fields))
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(seconds)
  return found[0] if found else None


_current: list[Watchdog] = []


@contextlib.contextmanager
def watch(
  deadlines: Deadlines, run_dir: str | os.PathLike, line: Line | None = None
) -> Iterator[None]:
  """Inside, and after it until `over`, no phase of this process lasts for ever.

  It ends the process: it is for commands, and not for a notebook.
  """
  doing.__init__()
  _current[:] = [Watchdog(deadlines, run_dir, line)]
  try:
    yield
  except BaseException as error:
    _current[0].text = f"{type(error).__name__}: {error}"
    raise
  finally:
    enter("end")


def over(code: int | None) -> None:
  """The command that was watched is over: the process ends with `code`, or goes on if None."""
  while _current:
    dog = _current.pop()
    dog.stop() if code is None else dog.leave(code)


def stop_at_once() -> None:
  """In a handler of signals, before the process ends."""
  for dog in _current:
    dog.stop_all()
