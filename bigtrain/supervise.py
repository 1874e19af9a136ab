"""Supervision: a small parent that starts a run again when it failed, hung or was killed.

`bigtrain train ... --supervise` is such a parent, one for each process of a job. It imports no jax
and touches no device, so that it survives whatever ends its child. A pipe tells it what the child
does; a child that says nothing, because it was stopped or a library holds Python's lock, is ended.
The child in turn ends with its parent, so that two never train in one run directory.

Restarts wait longer and longer, by the same times on every machine: processes of a job fail
together, and meet again together. They are counted from the last one that went on from a newer
checkpoint; so a run that fails at the same place again and again comes to an end.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from bigtrain.config import at_least_0, config
from bigtrain.exit_codes import UNHELPED, Exit
from bigtrain.tell import leaving, tell

VARIABLE = "BIGTRAIN_SUPERVISOR"  # Of a child: the parent's process, and the pipe to it.
FIRST = 600.0  # Seconds to the first sign of life: to import jax from a network file system.
TICK = 0.2  # Seconds between looks at the child.
KILL = 60.0  # Seconds in which a killed child has to be gone; who waits for a dead disk is not.
PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>.


@config
class Restarts:
  """How --supervise starts a run again."""

  limit: int = 10  # Restarts in a row that went on from no newer checkpoint, then it gives up.
  wait: float = 5.0  # Seconds before the first one; each later one waits twice as long.
  longest: float = 300.0  # Seconds that it waits at most.
  silence: float = 180.0  # Seconds without a sign of life, after which the run is ended; 0: never.

  def check(self) -> None:
    at_least_0(self, "restarts")


@dataclasses.dataclass
class Told:
  """What the child told of itself."""

  dir: str | None = None  # The run directory.
  first: int | None = None  # The step that it goes on from, when it knows.
  step: int = 0
  phase: str = "start"
  process: int | None = None  # Which of the job it is, once it knows.

  @property
  def has_stepped(self) -> bool:
    """Whether what the run directory tells is of its steps (replay.py is two behind)."""
    return self.first is not None and self.step > self.first + 2


class Supervisor:
  """Runs a command until it needs no restart.

  Args:
    command: of the child.
    restarts: how often and when.
    later: the command once a child has made steps; None for the same.
  """

  def __init__(
    self, command: Sequence[str], restarts: Restarts, later: Sequence[str] | None = None
  ):
    self.command, self.restarts, self.later = list(command), restarts, list(later or command)
    self.told = Told()
    self.asked: int | None = None  # The signal by which this process was asked to leave.
    self._child: subprocess.Popen | None = None
    self._wake_read, self._wake = os.pipe()

  def run(self) -> int:
    """The exit code of the last child."""
    before = {n: signal.signal(n, self._handle) for n in leaving()}
    try:
      return self._run()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _run(self) -> int:
    in_a_row, newest = 0, -1
    while True:
      code, how = self._once()
      if code in (Exit.DONE, *UNHELPED) or self.asked is not None:
        return code
      if (self.told.first or 0) > newest:  # What earlier ones did was not in vain.
        in_a_row, newest = 0, self.told.first or 0
      at = f"{how}, last heard of at step {self.told.step}, in {self.told.phase}"
      if self._child is not None:
        say(f"{at}; process {self._child.pid} cannot be killed and holds the run: giving up")
        return code
      if self.told.has_stepped:
        self.command = self.later
      if in_a_row == self.restarts.limit:
        say(f"{at}; giving up after {in_a_row} restarts without a newer checkpoint")
        return code
      wait = min(self.restarts.wait * 2**in_a_row, self.restarts.longest)
      in_a_row += 1
      say(f"{at}; restart {in_a_row} of {self.restarts.limit} in {wait:g} s")
      self._record(attempt=in_a_row, code=code, cause=how, after_seconds=wait)
      self._sleep(wait)
      if self.asked is not None:
        return Exit.LEFT

  def _once(self) -> tuple[int, str]:
    """Runs the child to its end: its exit code, and how that was in words."""
    read, write = os.pipe()
    environment = os.environ | {VARIABLE: f"{os.getpid()} {write}"}
    self.told = Told(dir=self.told.dir, process=self.told.process)
    try:
      # Of a group of its own, so that Ctrl-C comes to it once: from here.
      self._child = subprocess.Popen(
        self.command, env=environment, pass_fds=[write], process_group=0
      )
    finally:
      os.close(write)
    with open(read, "rb", buffering=0) as pipe:
      if self.asked is not None:  # Just before there was a child to tell.
        self._pass_on(signal.SIGTERM)
      silent = self._follow(self._child, pipe)
    if (status := self._child.poll()) is not None:
      self._child = None
    if silent or status is None:
      return Exit.DEADLINE, "ended without a sign of life"
    if status == -signal.SIGTERM and self.asked is not None:  # Before it could have saved anything.
      return Exit.LEFT, "left"
    if status < 0:
      return Exit.FAILED, f"killed by {signal.Signals(-status).name}"
    known = status in set(Exit)
    return status, f"ended with code {status}{f' ({Exit(status).name.lower()})' * known}"

  def _follow(self, child: subprocess.Popen, pipe) -> bool:
    """Listens until the child has ended; whether that was for its silence."""
    silence, rest, sources = self.restarts.silence, b"", [self._wake_read, pipe]
    silent, limit, looked = 0.0, max(silence, FIRST), time.monotonic()
    while child.poll() is None:
      ready, _, _ = select.select(sources, [], [], TICK)
      now = time.monotonic()
      silent += min(now - looked, 5 * TICK)  # This process may have been stopped with its child.
      looked = now
      if self._wake_read in ready:
        os.read(self._wake_read, 100)
      if pipe in ready:
        if data := pipe.read(65536):
          silent, limit = 0.0, silence
        else:
          sources.remove(pipe)  # Its end is closed: it is about to end.
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
          self.told = dataclasses.replace(self.told, **json.loads(line))
      if silence and silent > limit:
        say(f"no sign of life for {limit:.0f} s (--restarts.silence): the run is ended")
        child.send_signal(signal.SIGABRT)  # At which it writes its stacks, if it can.
        with contextlib.suppress(subprocess.TimeoutExpired):
          child.wait(min(10.0, silence))
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
          child.wait(KILL)
        return True
    return False

  def _handle(self, number: int, frame) -> None:
    """Passes on that it is to leave; a second Ctrl-C is one."""
    again = self.asked is not None and number == signal.SIGINT
    self.asked = number
    with contextlib.suppress(OSError):
      os.write(self._wake, b"x")
    self._pass_on(signal.SIGINT if again else signal.SIGTERM)

  def _pass_on(self, number: int) -> None:
    if self._child is not None and self._child.returncode is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._child.pid, number)

  def _sleep(self, seconds: float) -> None:
    if self.asked is None:
      select.select([self._wake_read], [], [], seconds)

  def _record(self, **fields) -> None:
    """An event in the run directory; of the first process alone, as all events."""
    if self.told.dir is None or self.told.process != 0:
      return
    from bigtrain.lines import add_event

    with contextlib.suppress(OSError):
      add_event(self.told.dir, "restart", step=self.told.step, **fields)


@config
class _Flags:
  restarts: Restarts = Restarts()


def command(arguments: Sequence[str]) -> int:
  """`bigtrain train ARGUMENTS`, of which --supervise is one, as a child.

  --allow_changes is for what is different now: once a child has gone on with that, later ones are
  checked again.

  Raises:
    Refused: a wrong --restarts. The child refuses whatever else is wrong.
  """
  words, own = iter(arguments), []
  for word in words:
    if word.startswith("--restarts"):
      own += [word] if "=" in word else [word, *itertools.islice(words, 1)]
  from bigtrain.flags import parse

  [flags] = parse([_Flags()], own, "bigtrain train --supervise", "")
  flags.restarts.check()
  rest = [word for word in arguments if word != "--supervise"]
  child = [sys.executable, "-m", "bigtrain.cli", "train", *rest]
  later = [word for word in child if word.replace("-", "_") != "__allow_changes"]
  return Supervisor(child, flags.restarts, later).run()


def tie() -> Callable[[dict[str, Any]], None] | None:
  """Called in a child: from now on it ends with its parent. Returns what tells that one of it.

  None where there is no such parent. It ends by SIGKILL, as the parent did that could not tell it:
  otherwise it would still hold the run directory when the parent is started again. Linux does that;
  elsewhere a child outlives a parent that was killed.
  """
  if (said := os.environ.pop(VARIABLE, None)) is None:
    return None
  parent, pipe = map(int, said.split())
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # It was killed just before that.
    os._exit(Exit.FAILED)
  os.set_inheritable(pipe, False)
  os.set_blocking(pipe, False)

  def tell(about: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # Full: the parent is stopped, and will read what is there.
      os.write(pipe, json.dumps(about).encode() + b"\n")

  return tell


def say(text: str) -> None:
  tell(f"supervisor: {text}")
