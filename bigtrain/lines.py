"""Files of JSON lines, to which records are added while others read. No jax is imported here."""

import json
import os
import time
from typing import Any

from etils import epath

from bigtrain import files


def add_event(run_dir: str | os.PathLike, name: str, **fields) -> None:
  """Adds a line to the events.jsonl of a run, for who does not hold it open."""
  epath.Path(run_dir).mkdir(parents=True, exist_ok=True)
  with open_lines(epath.Path(run_dir) / "events.jsonl") as file:
    file.write(json.dumps({"time": round(time.time(), 3), "event": name, **fields}) + "\n")


def open_lines(path: epath.Path):
  """A JSON-lines file to add to; a last line that a kill cut short is dropped first."""
  if path.exists() and not (text := path.read_text()).endswith("\n") and text:
    files.replace(path, text[: text.rfind("\n") + 1])
  return path.open("a")


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
  """The rows of a JSON-lines file; a last line that a kill cut short is not one."""
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows
