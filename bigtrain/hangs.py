"""What a hang leaves: RUN/hangs/<time>-process-<p>.txt of each process, and an exit code."""

import contextlib
import faulthandler
import os
import platform
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from typing import NoReturn

from etils import epath

from bigtrain.heartbeats import Beat
from bigtrain.phases import doing
from bigtrain.tell import tell


def write(
  run_dir: str | os.PathLike,
  process: int,
  cause: str,
  beats: Mapping[int, Beat],
  missing: Collection[int],
) -> None:
  """Writes what this process did, and the stacks of all its threads.

  Args:
    run_dir: the run directory.
    process: which one this is.
    cause: why this is written.
    beats: what the processes last told, on the first one.
    missing: the processes that the others wait for.
  """
  now = time.monotonic()
  folder = epath.Path(run_dir) / "hangs"
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-process-{process}.txt"
  lines = [
    f"process {process} on {platform.node()}, pid {os.getpid()}: {cause}",
    f"in {doing.name} for {now - doing.since:.1f} s",
    f"last step: {doing.step}, {now - doing.stepped:.1f} s ago",
    *(f"process {p} is missing: {beats.get(p, 'silent')}" for p in missing),
    *(f"process {p}: {beat}" for p, beat in beats.items() if p not in missing),
    "",
    stacks(),
  ]
  path.write_text("\n".join(lines))
  say(process, f"the stacks of its threads are in {path}")


def stacks() -> str:
  """Of all threads of this process, the newest frame of each first."""
  with tempfile.TemporaryFile("w+") as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()


def say(process: int, text: str) -> None:
  """Tells people, not through objects that the main thread may hold."""
  tell(f"process {process}: {text}")


def leave(code: int) -> NoReturn:
  """Ends the process without a word to jax, which would wait for the others."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)
