"""Tokenising a source into a folder, streamed: memory does not grow with the corpus.

For each split the folder holds `tokens`, `offsets` and `windows` (see `Writer`); `problems.jsonl`
names all input that was kept out, and `manifest.json` counts everything.
"""

import collections
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bigtrain.config import Refused
from bigtrain.console import Progress
from bigtrain.data.readers import Problem
from bigtrain.data.rows import WINDOW
from bigtrain.data.sources import Austen, Document, Files, Input, PreparedText
from bigtrain.data.tokenizers import Tokenizer

BATCH_BYTES = 2**20  # Text tokenised at once.
BATCH_DOCUMENTS = 4096
CHECKED = 2**30  # Bytes up to which a file's contents are checked at each start: about a second.


class Writer:
  """The files of one split, little-endian and without headers.

  - `tokens`: every document's ids, with an end-of-text before the first and after each. Position p
    has tokens[p] as its input and tokens[p + 1] as its target.
  - `offsets`: the position at which each document starts, and the end of the last; int64.
  - `windows`: those of every 1024th document, and the end; int64.
  """

  def __init__(self, folder: pathlib.Path, name: str, dtype: str, eot: int):
    self._files = {p: (folder / f"{name}.{p}").open("wb") for p in ("tokens", "offsets", "windows")}
    self._eot = np.array([eot], dtype)
    self._files["tokens"].write(self._eot.tobytes())
    self.counts = {"documents": 0, "positions": 0, "bytes": 0}

  def add(self, ids: np.ndarray, text_bytes: int) -> None:
    self._mark(("offsets", "windows") if self.counts["documents"] % WINDOW == 0 else ("offsets",))
    self._files["tokens"].write(np.append(ids, self._eot).astype(self._eot.dtype).tobytes())
    self.counts["documents"] += 1
    self.counts["positions"] += len(ids) + 1
    self.counts["bytes"] += text_bytes

  def close(self) -> None:
    self._mark(("offsets", "windows"))
    for file in self._files.values():
      file.close()

  def _mark(self, parts: tuple[str, ...]) -> None:
    for part in parts:
      self._files[part].write(np.array(self.counts["positions"], "<i8").tobytes())


def build(
  source: Austen | Files | PreparedText,
  inputs: list[Input],
  tokenizer: Tokenizer,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Tokenises every document of `source` into the empty `folder`; returns its manifest.

  Raises:
    Refused: there is no document to train on or none to hold out, or bad input where the source
      refuses that.
  """
  dtype = "<u2" if tokenizer.vocab <= 2**16 else "<u4"
  train, validation = (
    Writer(folder, name, dtype, tokenizer.eot) for name in ("train", "validation")
  )
  kinds: collections.Counter[str] = collections.Counter()
  first = None
  total = sum(path.stat().st_size for path, _ in inputs)
  with Progress("tokenising", total) as progress, (folder / "problems.jsonl").open("w") as log:
    for found in _batches(source.documents(progress.advance)):
      documents = [d for d in found if isinstance(d, Document)]
      encoded = tokenizer.encode_batch([d.text for d in documents])
      for document, ids in zip(documents, encoded, strict=True):
        (validation if document.held_out else train).add(ids, len(document.text.encode()))
      for problem in (p for p in found if isinstance(p, Problem)):
        kinds[problem.kind] += 1
        first = first or problem
        log.write(json.dumps(problem._asdict(), default=str) + "\n")
  train.close()
  validation.close()
  if not train.counts["documents"]:
    raise Refused(f"the source has no document to train on{f'; {first}' if first else ''}")
  if isinstance(source, Files) and source.validation and not validation.counts["documents"]:
    raise Refused(
      f"validation={source.validation!r} holds out none of the {train.counts['documents']} "
      "documents: take a larger share or the pattern of other files, or 0 to evaluate nothing"
    )
  manifest = {
    "source": source.settings(),
    "inputs": [str(path) for path, _ in inputs],
    "tokenizer": tokenizer.digest,
    "vocab": tokenizer.vocab,
    "dtype": dtype,
    "splits": {"train": train.counts, "validation": validation.counts},
    "problems": dict(kinds.most_common()),
    "files": {path.name: [path.stat().st_size, crc(path)] for path in sorted(folder.iterdir())},
  }
  manifest["crc"] = zlib.crc32(json.dumps(manifest).encode())
  (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
  # The rename that follows must not reach the disk before what is in the folder.
  for path in (*folder.iterdir(), folder):
    sync(path)
  return manifest


def crc(path: pathlib.Path) -> int:
  """The checksum of a file."""
  found = 0
  with path.open("rb") as file:
    while block := file.read(2**22):
      found = zlib.crc32(block, found)
  return found


def is_whole(folder: pathlib.Path, manifest: Any) -> bool:
  """Whether the folder holds what `build` wrote, by its manifest; of a large file only the size.

  Raises:
    OSError: something is not there.
  """
  known = dict(manifest) if isinstance(manifest, dict) else {}
  if known.pop("crc", None) != zlib.crc32(json.dumps(known).encode()):
    return False
  for name, (size, expected) in known["files"].items():
    path = folder / name
    if path.stat().st_size != size or (size <= CHECKED and crc(path) != expected):
      return False
  return True


def sync(path: pathlib.Path) -> None:
  """Waits until a file or folder is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _batches(found: Iterable[Document | Problem]) -> Iterator[list[Document | Problem]]:
  batch, size = [], 0
  for item in found:
    batch.append(item)
    size += len(item.text) if isinstance(item, Document) else 0
    if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
      yield batch
      batch, size = [], 0
  yield batch
