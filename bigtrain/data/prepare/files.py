"""Files of a preparation: written whole or not at all, and compressed lines of JSON.

A task that is killed leaves at most files that end in `.part`; done again, it writes the same
bytes.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import zstandard

LEVEL = 3  # Of zstd: beyond it the texts get a few percent smaller and writing takes twice as long.
PART = ".part"


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file to write that gets its name when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
  try:
    with part.open("wb") as file:
      yield file
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


class Lines:
  """JSON objects, one a line, into a zstd file."""

  def __init__(self, file: BinaryIO):
    self._stream = zstandard.ZstdCompressor(LEVEL).stream_writer(file, closefd=False)

  def add(self, record: dict[str, Any]) -> None:
    self._stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

  def __enter__(self) -> "Lines":
    return self

  def __exit__(self, *error) -> None:
    self._stream.close()


@contextlib.contextmanager
def lines(path: pathlib.Path) -> Iterator[Lines]:
  """A file of `Lines` that gets its name when it is complete."""
  with whole(path) as file, Lines(file) as made:
    yield made


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The objects of a file of `Lines`, in order."""
  decoder = zstandard.ZstdDecompressor()
  rest = b""
  with path.open("rb") as file, decoder.stream_reader(file) as stream:
    while block := stream.read(2**20):
      *ended, rest = (rest + block).split(b"\n")
      yield from map(json.loads, ended)


def write_json(path: pathlib.Path, value: Any) -> None:
  with whole(path) as file:
    file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding="utf-8"))


def write_array(path: pathlib.Path, values: np.ndarray) -> None:
  with whole(path) as file:
    np.save(file, values)


def mapped(path: pathlib.Path, dtype: str, columns: int) -> np.ndarray:
  """(n, columns) of a file of numbers; what is not looked at is not in memory."""
  if path.stat().st_size == 0:  # Which cannot be mapped.
    return np.zeros((0, columns), dtype)
  return np.memmap(path, dtype, "r").reshape(-1, columns)


def digest(text: str) -> bytes:
  """16 bytes that stand for a text: equal ones are taken for equal texts."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()
