"""Files of JSON lines, to which records are added while others read. No jax is imported here.

What is read of them is not believed: a line that is not what it should be is left out.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from bigtrain import files
from bigtrain.secrets import redacted

# Fields of an event that others reckon with.
NUMBERS = ("seconds", "step", "until", "to", "lost_steps", "lost_seconds", "devices")


def add_event(run_dir: str | os.PathLike, name: str, **fields) -> None:
  """Adds an event to the events.jsonl of a run, for who does not hold it open."""
  epath.Path(run_dir).mkdir(parents=True, exist_ok=True)
  with open_lines(epath.Path(run_dir) / "events.jsonl") as file:
    file.write(json.dumps(event(name, fields)) + "\n")


def event(name: str, fields: dict[str, Any]) -> dict[str, Any]:
  """An event with the time, and without secrets."""
  return {"time": round(time.time(), 3), "event": name} | redacted(fields)


def open_lines(path: epath.Path):
  """A JSON-lines file to add to, whoever else does: nothing that is there is changed."""
  torn = _is_torn(path)
  file = path.open("a")
  if torn:  # By a kill, or another is just writing.
    file.write("\n")
  return file


def drop_torn(path: epath.Path) -> None:
  """Drops a last line that a kill cut short; for the run itself, while no other writes there."""
  if not _is_torn(path):
    return
  data = path.read_bytes()
  whole = data[: data.rfind(b"\n") + 1]
  if "://" in str(path):
    files.replace(path, whole.decode(errors="replace"))
  else:
    os.truncate(path, len(whole))  # In place: another may have it open.


def _is_torn(path: epath.Path) -> bool:
  if not path.exists():
    return False
  with path.open("rb") as file:
    file.seek(0, os.SEEK_END)
    if not file.tell():
      return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_events(path: epath.Path) -> list[dict[str, Any]]:
  """The events in an events.jsonl; none where there is no such file."""
  return [event for event in _objects(path) if _is_event(event)]


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl, with what in them is a number; none where there is no file."""
  is_row = lambda row: isinstance(row.get("kind"), str) and type(row.get("step")) is int
  keeps = lambda name, value: name == "kind" or value is None or is_number(value)
  rows = filter(is_row, _objects(path))
  return [{name: value for name, value in row.items() if keeps(name, value)} for row in rows]


def _objects(path: epath.Path) -> Iterator[dict[str, Any]]:
  """A line that a kill cut short is not one."""
  for line in path.read_bytes().split(b"\n") if path.exists() else ():
    try:
      found = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(found, dict):
      yield found


def is_number(value: Any) -> bool:
  """Whether this is a finite number."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_event(event: dict[str, Any]) -> bool:
  known = (event[name] for name in NUMBERS if event.get(name) is not None)
  return isinstance(event.get("event"), str) and all(map(is_number, [event.get("time"), *known]))
