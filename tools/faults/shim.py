"""Faults of the file system and of the clock for one process, by a library that is preloaded."""

import ctypes
import enum
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


class Kind(enum.IntEnum):
  """What happens at a call that changes a file; the order is that of shim.c."""

  NONE = 0
  KILL = 1  # The process is killed before it.
  TORN = 2  # The process is killed when half of it is done.
  FULL = 3  # It fails: the disk is full.
  BROKEN = 4  # It fails: the disk does not answer.
  READ_ONLY = 5  # It fails: the disk cannot be written.
  SLOW = 6  # It takes 0.2 s more.


def build() -> Path:
  """Compiles the library, once for each version of its source."""
  made = (
    Path(tempfile.gettempdir()) / f"bigtrain-faults-{os.getuid()}-{SOURCE.stat().st_mtime_ns}.so"
  )
  if not made.exists():
    aside = made.with_suffix(f".{os.getpid()}")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(aside), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    aside.rename(made)
  return made


def environment(
  path: Path | None = None,
  kind: Kind = Kind.NONE,
  first: int = 1,
  last: int = 0,
  *,
  clock: tuple[float, float] | None = None,
  control: "Control | None" = None,
) -> dict[str, str]:
  """What a process is started with, so that calls under `path` from number `first` to `last` fail.

  Args:
    last: 0 for no end.
    clock: seconds by which the wall clock jumps, and after how many.
    control: by which `kind` and the clock are changed while it runs.
  """
  settings = {"LD_PRELOAD": str(build())}
  if path is not None:
    settings |= {"FAULT_PATH": str(path), "FAULT_KIND": str(int(kind))}
    settings |= {"FAULT_AT": str(first), "FAULT_TO": str(last)}
  if clock is not None:
    settings |= {"FAULT_CLOCK": str(clock[0]), "FAULT_CLOCK_FROM": str(clock[1])}
  if control is not None:
    settings["FAULT_CONTROL"] = str(control.path)
  return settings


class Control:
  """A file through which processes that were started with it are troubled at any time."""

  def __init__(self, path: Path):
    self.path, self._kind, self._jump = path, Kind.NONE, 0.0
    self._write()

  def kind(self, kind: Kind) -> None:
    self._kind = kind
    self._write()

  def jump(self, seconds: float) -> None:
    """The wall clock is off by so many seconds from now on."""
    self._jump = seconds
    self._write()

  def _write(self) -> None:
    with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
      file.write(struct.pack("ld", int(self._kind), self._jump))


def preload() -> None:
  """Starts this command again with the library, unless it is there."""
  if "bigtrain-faults" not in os.environ.get("LD_PRELOAD", ""):
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | environment())


def arm(path: Path, kind: Kind, first: int, last: int = 0) -> None:
  """Of this process, in which the library is loaded; also after a fork."""
  library = ctypes.CDLL(None)
  library.fault_arm(str(path).encode(), int(kind), ctypes.c_long(first), ctypes.c_long(last))


def seen() -> int:
  """How many calls were counted since `arm`."""
  library = ctypes.CDLL(None)
  library.fault_seen.restype = ctypes.c_long
  return library.fault_seen()
