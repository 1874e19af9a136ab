"""Small files that are written whole or not at all."""

import json
import os
import pathlib
from typing import Any

from etils import epath

VISIBLE = 20.0  # Seconds that a file system may take to show a file to another host.


def replace(path: epath.Path | pathlib.Path, text: str) -> None:
  """Writes a file anew. Who reads meanwhile, or after a kill, finds the old text or the new one."""
  aside = path.with_name(f"{path.name}.unfinished")
  try:
    if os.path.islink(aside):  # In a folder of someone else it could lead to any file.
      os.unlink(aside)
    with aside.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      if "://" not in str(path):
        os.fsync(file.fileno())
    aside.replace(path)
  except OSError as error:  # Of a write it does not say of which file.
    raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def replace_json(path: epath.Path, value: Any) -> None:
  replace(path, json.dumps(value) + "\n")


def read_json(path: epath.Path | pathlib.Path) -> Any:
  """None where there is no such file, or one that is damaged."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return None
