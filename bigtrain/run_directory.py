"""The run directory: what a run writes about itself, and how that is read back.

    RUN/  config.json  experiment.py  environment.json  data.json  tokenizer.json  metrics.jsonl
          events.jsonl  checkpoints/  hangs/  tensorboard/  profile/

Only the first process writes. Rows of metrics.jsonl are unique by (step, kind): when a run resumes,
rows past the restored step are dropped before new ones are written.
"""

import contextlib
import errno
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath
from filelock import FileLock, Timeout

from bigtrain import config, files, load
from bigtrain.config import Refused
from bigtrain.experiment import Experiment
from bigtrain.hints import either
from bigtrain.lines import drop_torn, event, open_lines, read_events, read_rows
from bigtrain.secrets import redacted

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
LOCK = "run.lock"
SAVED = ("verified", "damaged")  # Events that tell that there was a checkpoint.
SKIPS = "skips.json"  # Data that were left out after a fault, by the step of the checkpoint.
# Troubles of a disk that has worked before, and may work again.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
PACKAGES = ("bigtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunDirectory:
  """Paths and records of one run. With `writes` False (other processes) nothing is written."""

  def __init__(self, path: str | os.PathLike, *, writes: bool = True):
    self.path = epath.Path(os.path.expanduser(os.fspath(path)))
    if "://" not in str(self.path):
      self.path = epath.Path(os.path.abspath(self.path))  # Orbax takes no relative path.
    self.writes = writes
    self._files: dict[str, Any] = {}
    self.allow_changes = False  # Going on although the config or the data are others.
    self._locked: FileLock | None = None

  @property
  def checkpoints(self) -> epath.Path:
    return self.path / "checkpoints"

  def begin(self, experiment: Experiment, source: Path | None, *, allow_changes: bool) -> None:
    """Writes what the run is, or checks it against what an earlier start wrote.

    A run that has neither a row nor a checkpoint yet has nothing that a change could contradict.

    Raises:
      Refused: the directory holds a run of another config, and `allow_changes` is False; or
        something else; or it cannot be written.
      OSError: it can just now not be written, but holds a run: a full disk may have room again.
    """
    self.allow_changes = allow_changes
    # Listed once: another process may be writing config.json, and then more, at this moment.
    names = {path.name for path in self.path.glob("*")}
    if "config.json" in names:
      before, _ = load.read(self.path)
      changes = [] if allow_changes or not self._has_trained() else config.diff(before, experiment)
      if changes:
        raise Refused(
          f"{self.path} holds a run of another config:\n  "
          + "\n  ".join(changes)
          + f"\ntake another directory with {_dir()}, or go on with the new config: {_changes()}"
        )
      done = max(self._saved(), default=0)
      if experiment.steps is not None and done > experiment.steps:
        raise Refused(
          f"{self.path} is at step {done} already, and this is a run of {experiment.steps}; "
          f"ask for more steps, or take another directory with {_dir()}"
        )
    elif foreign := sorted(filter(_foreign, names)):
      raise Refused(
        f"{self.path} has no config.json but {', '.join(foreign[:5])}: "
        f"put that of the run back, or take another directory with {_dir()}"
      )
    if not self.writes:
      return
    try:
      self._lock()
      load.write(experiment, self.path, source)
      files.replace(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
      for name in (METRICS, EVENTS):
        drop_torn(self.path / name)
    except OSError as error:
      if error.errno in PASSING and self._has_trained():
        raise  # What is no longer there when the run is started again.
      raise Refused(
        f"cannot write the run directory {self.path}: {error.strerror or error}; "
        f"take another with {_dir()}"
      ) from error

  def check_data(self, digest: str | None) -> None:
    """Refuses to go on with other data than the run began with; at its start, notes which it is."""
    path, found = self.path / "data.json", json.dumps({"digest": digest}) + "\n"
    if path.exists() and not self.allow_changes and self._has_trained():
      if path.read_text() != found:
        raise Refused(
          f"the files of the data are not those that {self.path} was trained on: put them back, "
          f"take another directory with {_dir()}, or go on with the new ones: {_changes()}"
        )
    elif self.writes:
      files.replace(path, found)

  def skip(self, step: int, example: int) -> None:
    """Remembers that a run which goes on from `step` does so with the data from `example` on."""
    if self.writes:
      earlier = {at: to for at, to in self._skips().items() if int(at) < step}
      files.replace_json(self.path / SKIPS, earlier | {str(step): example})

  def skipped_to(self, step: int) -> int | None:
    """The example with which a run goes on from `step`, if it is another than the state's.

    Raises:
      Refused: what was noted of that is damaged.
    """
    return self._skips().get(str(step))

  def _skips(self) -> dict[str, int]:
    if not (path := self.path / SKIPS).exists():
      return {}
    found = files.read_json(path)
    is_skip = lambda at, to: at.isdecimal() and type(to) is int
    if not isinstance(found, dict) or not all(is_skip(*skip) for skip in found.items()):
      raise Refused(
        f"{path} is damaged: it tells which data were left out after a fault. Put it back from a "
        "copy, or remove it: the run then meets those data again, and does again what its policy "
        "says"
      )
    return found

  @property
  def tokenizer(self) -> epath.Path:
    return self.path / "tokenizer.json"

  def keep_tokenizer(self, text: str | None) -> None:
    """Keeps what turns text into tokens, so that sampling needs no corpus."""
    if self.writes and text is not None:
      files.replace(self.tokenizer, text)

  def event(self, name: str, **fields) -> None:
    """Adds a line to events.jsonl, with the time and without secrets."""
    self._append(EVENTS, event(name, fields))

  def row(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Adds a row to metrics.jsonl, with the time; what is no finite number becomes null."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    head = {"step": step, "kind": kind, "time": round(time.time(), 3)}
    self._append(METRICS, head | finite)

  def drop_rows_after(self, step: int) -> list[dict[str, Any]]:
    """Forgets what was recorded of steps that a restored run will do again; returns the metrics."""
    if not self.writes:
      return []
    skips = self._skips()
    if any(int(at) > step for at in skips):
      left = {at: to for at, to in skips.items() if int(at) <= step}
      files.replace_json(self.path / SKIPS, left)
    path = self.path / METRICS
    if not path.exists():
      return []
    if (file := self._files.pop(path.name, None)) is not None:  # It is of the old rows.
      file.close()
    rows = read_rows(path)
    if dropped := [row for row in rows if row["step"] > step]:
      files.replace(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    return dropped

  def rows(self, kind: str) -> list[dict[str, Any]]:
    """The rows of that kind ("train" or "eval"), in order."""
    path = self.path / METRICS
    return [row for row in read_rows(path) if row["kind"] == kind]

  def events(self) -> list[dict[str, Any]]:
    """All events, in order."""
    return read_events(self.path / EVENTS)

  def has_saved(self) -> bool:
    """Whether this run has had a checkpoint since it last began at step 0."""
    tell = [e["event"] for e in self.events() if e["event"] in (*SAVED, "initialise")]
    return bool(tell) and tell[-1] in SAVED

  def _lock(self) -> None:
    """Keeps out a second start of the same run; the lock goes with the process."""
    if "://" in str(self.path):
      return
    self.path.mkdir(parents=True, exist_ok=True)
    self._locked = FileLock(self.path / LOCK)
    try:
      self._locked.acquire(timeout=0)
    except Timeout:
      raise Refused(
        f"another process trains in {self.path}: wait for it, or take another with {_dir()}"
      ) from None

  def close(self) -> None:
    if self._locked is not None:
      self._locked.release()
    for file in self._files.values():
      with contextlib.suppress(OSError):  # Every line was flushed, or that was raised.
        file.close()
    self._files.clear()

  def _append(self, name: str, record: dict[str, Any]) -> None:
    if not self.writes:
      return
    if name not in self._files:
      self._files[name] = open_lines(self.path / name)
    try:
      self._files[name].write(json.dumps(record) + "\n")
      self._files[name].flush()
    except OSError as error:
      raise OSError(error.errno, error.strerror, os.fspath(self.path / name)) from error

  def _has_trained(self) -> bool:
    return (self.path / METRICS).exists() or bool(self._saved())

  def _saved(self) -> list[int]:
    """The steps of the checkpoints, by the names of their directories."""
    return [int(path.name) for path in self.checkpoints.glob("*") if path.name.isdecimal()]


def environment() -> dict[str, Any]:
  """Versions, devices, code revision and command of this process; without secrets."""
  import jax

  devices = jax.devices()
  return {
    "command": redacted(sys.argv),
    "python": platform.python_version(),
    "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
    "devices": [len(devices), devices[0].platform, devices[0].device_kind],
    "processes": jax.process_count(),
    "revision": revision(),
  }


def _dir() -> str:
  return either("dir", "run_dir")


def _changes() -> str:
  return either("allow_changes", "allow_changes=True")


def _foreign(name: str) -> bool:
  """Whether this is more than a start leaves that ended before it wrote config.json."""
  left = (config.FILE, LOCK, EVENTS, "hangs")
  return name not in left and not name.endswith(".unfinished")


def _installed(name: str) -> bool:
  try:
    return bool(metadata.version(name))
  except metadata.PackageNotFoundError:
    return False


def revision() -> str | None:
  """The git revision of the code, with a + if files differ from it; None outside a checkout."""
  command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
