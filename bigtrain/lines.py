"""Records of JSON, of which others read while lines are added. No jax is imported here.

What is read is not believed: a line that is not what it should be is left out. What is read can be
written again and reckoned with: there are no halves of UTF-16 pairs in its text, its whole numbers
have 64 bits, it nests no deeper than any record does, and a step or a time is one.
"""

import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from bigtrain import files
from bigtrain.secrets import redacted

# Fields of events and rows that others reckon with, or count: whole numbers, seconds, and words.
COUNTS = ("step", "to", "lost_steps", "devices", "process")
TIMES = ("time", "until", "seconds", "lost_seconds")
WORDS = ("phase", "cause")
NEEDED = {"rollback": ("to",)}  # By events of that name.
MOST = 2**53  # Of a count: larger ones have no float of their own.
LATEST = 253_402_300_799  # The last second of the year 9999, behind which calendars end.
LARGEST = 1e305  # Of a number: its multiples stay finite. A perplexity is e^700 at most.
DEEPEST = 32  # Levels of lists and objects.


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
  known = lambda name, value: value is not None or name not in (*COUNTS, *TIMES, *WORDS)
  found = ({k: v for k, v in event.items() if known(k, v)} for event in _objects(path))
  return list(filter(_is_event, found))


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl, with what in them is a number; none where there is no file."""
  is_row = lambda row: isinstance(row.get("kind"), str) and _is_count(row.get("step"))
  rows = filter(is_row, _objects(path))
  return [{name: value for name, value in row.items() if _is_of_row(name, value)} for row in rows]


def read_object(path: epath.Path | pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; empty where there is no such file, or another thing in it."""
  try:
    return _object(path.read_bytes()) or {}
  except OSError:
    return {}


def _objects(path: epath.Path) -> Iterator[dict[str, Any]]:
  """A line that a kill cut short is not one."""
  lines = path.read_bytes().split(b"\n") if path.exists() else ()
  return filter(None, map(_object, lines))


def _object(text: bytes) -> dict[str, Any] | None:
  try:
    found = json.loads(text, parse_int=_integer)
    # Nearly all lines are flat, of plain words and numbers: there is nothing to tame in them.
    is_plain = text.isascii() and not (b"\\" in text or b"[" in text or text.count(b"{") > 1)
    found = found if is_plain else _tame(found, DEEPEST)
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def _tame(value: Any, deepest: int) -> Any:
  if isinstance(value, str):
    return value if value.isascii() else value.encode(errors="replace").decode()
  if not isinstance(value, dict | list):
    return value
  if not deepest:
    raise ValueError("no record nests so deep")
  if isinstance(value, list):
    return [_tame(item, deepest - 1) for item in value]
  return {_tame(name, 0): _tame(item, deepest - 1) for name, item in value.items()}


def _integer(digits: str) -> int | float:
  fits = len(digits) <= 20 and -(2**63) <= int(digits) < 2**63
  return int(digits) if fits else float(digits)


def _is_number(value: Any) -> bool:
  # Ends of a range, for all that is compared with NaN is False.
  return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value <= MOST


def _is_time(value: Any) -> bool:
  return _is_number(value) and 0 <= value <= LATEST


def _is_of_row(name: str, value: Any) -> bool:
  if name == "time":
    return _is_time(value)
  return name == "kind" or value is None or _is_number(value)


def _is_event(event: dict[str, Any]) -> bool:
  return (
    isinstance(event.get("event"), str)
    and all(name in event for name in ("time", *NEEDED.get(event["event"], ())))
    and all(_is_count(event[name]) for name in COUNTS if name in event)
    and all(_is_time(event[name]) for name in TIMES if name in event)
    and all(isinstance(event[name], str) for name in WORDS if name in event)
  )
