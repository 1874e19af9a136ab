"""The processes of a run, held by the launcher: started together, and again after a fault."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from bigtrain.exit_codes import Exit
from bigtrain.launch.job import Command
from bigtrain.launch.script import LASTING, MISSING

LONGEST = 300.0  # Seconds before a restart at most, however often it was doubled.
LATE = 30.0  # Seconds that a host has to end its process by itself, after the grace.


def hold(commands: Sequence[Command], *, restarts: int, grace: int, pause: float) -> int:
  """Runs the processes until they are done, refused, or restarted too often in a row.

  A start that lasted is the first of a new row. Whether it made progress is not seen here: those
  that made none `train` refuses itself (preflight.py).

  Args:
    commands: one for each process; its standard input is kept open after what it reads.
    restarts: how often in a row all of them are started again.
    grace: seconds that the others have when one has ended.
    pause: seconds before the first restart.

  Returns:
    The exit code: of the processes, or LEFT after SIGINT or SIGTERM.
  """
  failed, wait = 0, pause
  while True:
    began = time.monotonic()
    with _signals() as asked:
      codes = _attempt(commands, grace, asked)
      told = ", ".join(f"{c.name} {code}" for c, code in zip(commands, codes, strict=True))
      if asked.is_set():
        _say(f"left; exit codes: {told}")
        return Exit.LEFT
      if (code := _verdict(codes)) in (Exit.DONE, Exit.REFUSED, Exit.CHECK):
        _say(f"ended; exit codes: {told}")
        return code
      if time.monotonic() - began > LASTING:
        failed, wait = 0, pause
      if failed == restarts:
        _say(f"exit codes: {told}; restarted {restarts} times in a row")
        return code
      failed += 1
      _say(f"exit codes: {told}; restart {failed} of {restarts} in {wait:.0f} s")
      if asked.wait(wait):
        return Exit.LEFT
    wait = min(2 * wait, LONGEST)


def _verdict(codes: Sequence[int]) -> int:
  """What the codes of all processes say together: a refusal outweighs what it did to the others."""
  if {Exit.REFUSED, *MISSING} & set(codes):
    return Exit.REFUSED
  if Exit.CHECK in codes:
    return Exit.CHECK
  if all(code == Exit.DONE for code in codes):
    return Exit.DONE
  known = [code for code in (Exit.DEADLINE, Exit.LEFT) if code in codes]
  return known[0] if known else Exit.FAILED


def _attempt(commands: Sequence[Command], grace: int, asked: threading.Event) -> list[int]:
  """The exit codes of one start."""
  processes = [_started(command) for command in commands]
  outputs = [
    threading.Thread(target=_pass_on, args=pair, daemon=True)
    for pair in zip(commands, processes, strict=True)
  ]
  for thread in outputs:
    thread.start()
  try:
    while all(p.poll() is None for p in processes) and not asked.wait(0.1):
      pass
    if not asked.is_set():
      _wait(processes, grace, asked)
    for process in processes:
      _end_lease(process)
    _wait(processes, grace + LATE, threading.Event())
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
      process.wait()
    for thread in outputs:
      thread.join(LATE)
  return [process.returncode for process in processes]


def _started(command: Command) -> subprocess.Popen:
  process = subprocess.Popen(
    command.argv,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    start_new_session=True,  # Ctrl-C is for the launcher, which tells the hosts.
  )
  assert process.stdin is not None
  # A script fits a pipe's buffer, or is read; what cannot be reached says so by its exit code.
  with contextlib.suppress(OSError):
    process.stdin.write((command.stdin or "").encode())
    process.stdin.flush()
  return process


def _end_lease(process: subprocess.Popen) -> None:
  """Asks the host to end its process (remote.py)."""
  assert process.stdin is not None
  with contextlib.suppress(OSError):
    process.stdin.close()


def _wait(processes: Sequence[subprocess.Popen], seconds: float, asked: threading.Event) -> None:
  """Waits so long at most until all have ended."""
  until = time.monotonic() + seconds
  while any(p.poll() is None for p in processes) and time.monotonic() < until:
    if asked.wait(0.1):
      return
    time.sleep(0.1)


def _pass_on(command: Command, process: subprocess.Popen) -> None:
  """Prints what a process prints, each line after its host."""
  for line in process.stdout or ():
    sys.stdout.write(f"[{command.name}] {line.decode(errors='replace')}")
    sys.stdout.flush()


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
  """Set as soon as SIGINT, SIGTERM or SIGHUP came."""
  asked = threading.Event()
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _say(text: str) -> None:
  print(f"bigtrain: {text}", file=sys.stderr, flush=True)
