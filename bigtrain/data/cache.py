"""The cache: a source tokenised once into a folder of flat arrays, found again by its content.

A folder is named by a hash of its inputs' contents, the settings and the format version. It is
built beside its place under a lock and renamed when it is whole: a folder with the right name is a
finished one. The caches of a user are in $BIGTRAIN_CACHE, else in bigtrain/ of $XDG_CACHE_HOME,
else in ~/.cache/bigtrain.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigtrain.config import Refused
from bigtrain.console import Progress, say
from bigtrain.data.build import build, is_whole, sync
from bigtrain.data.readers import Problem, kind_of
from bigtrain.data.sources import Austen, Document, Files, Input, PreparedText
from bigtrain.data.tokenizers import BPE, Bytes, Tokenizer, TokenizerFile
from bigtrain.files import read_json

FORMAT = 1  # Raised by whatever changes the bytes that are written.
NOTHING = hashlib.sha256().hexdigest()  # The contents of an empty file.
LEARN_BYTES = 10**9  # Of the training split, about, from which a tokenizer learns: plenty for BPE.


class Stored:
  """An array in a file, of which only what is sliced is read, by any number of threads.

  Not a memory map: a cold page fault reads a megabyte around it, was 50 times slower than this for
  a row in a large file (3.5 ms against 0.07), holds Python's lock meanwhile, and is counted as this
  process's memory.
  """

  def __init__(self, path: pathlib.Path, dtype: str):
    self._path, self._file = path, path.open("rb", buffering=0)
    self._dtype = np.dtype(dtype)
    self._length = path.stat().st_size // self._dtype.itemsize

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, at: slice) -> np.ndarray:
    start, stop, _ = at.indices(self._length)
    size = self._dtype.itemsize
    data = os.pread(self._file.fileno(), (stop - start) * size, start * size)
    if len(data) != max(stop - start, 0) * size:
      raise OSError(f"{self._path} was cut off while it was read; the next start makes it again")
    return np.frombuffer(data, self._dtype)


class Split(NamedTuple):
  """One tokenised split; `build.Writer` says what is in the arrays."""

  tokens: Stored
  offsets: Stored
  windows: np.ndarray
  documents: int


class Prepared(NamedTuple):
  """A tokenised source."""

  folder: pathlib.Path
  tokenizer: Tokenizer
  manifest: dict[str, Any]

  def kept_out(self) -> str | None:
    """What of the input is not in the data, how often and why; None if all is."""
    if not (kinds := self.manifest["problems"]):
      return None
    counts = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    path = self.folder / "problems.jsonl"
    with path.open() as log:
      first = Problem(**json.loads(log.readline()))
    return f"kept out of the data: {counts}; first {first}; all in {path}"

  def split(self, name: str) -> Split:
    return Split(
      Stored(self.folder / f"{name}.tokens", self.manifest["dtype"]),
      Stored(self.folder / f"{name}.offsets", "<i8"),
      np.fromfile(self.folder / f"{name}.windows", "<i8"),
      self.manifest["splits"][name]["documents"],
    )


def root() -> pathlib.Path:
  """Where this user's caches are.

  Raises:
    Refused: it cannot be written.
  """
  xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  path = pathlib.Path(os.environ.get("BIGTRAIN_CACHE") or f"{xdg}/bigtrain").expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise Refused(
      f"the cache {path} cannot be written: {error.strerror}; set BIGTRAIN_CACHE to a folder of "
      "your own"
    ) from error
  return path


def prepare(
  source: Austen | Files | PreparedText, tokenizer: Bytes | BPE | TokenizerFile
) -> Prepared:
  """The tokenised source, from the cache or built now; two processes at once build it once.

  Raises:
    Refused: no input, nothing usable in it, or bad input where the source refuses that.
  """
  from filelock import FileLock, Timeout

  folder = root() / "data"
  folder.mkdir(parents=True, exist_ok=True)
  inputs = source.inputs()
  contents = _contents(inputs)
  _check_apart(inputs, contents)
  corpus = _digest(FORMAT, source.settings(), contents)
  lock = FileLock(folder / f"{corpus}.lock")
  try:
    lock.acquire(timeout=1)
  except Timeout:
    say(f"waiting for another process that prepares this data ({lock.lock_file})")
    lock.acquire()
  try:
    made = tokenizer.make(corpus, lambda: _learning_texts(source, inputs), root() / "tokenizers")
    final = folder / _digest(corpus, made.digest)
    if (manifest := _finished(final)) is None:
      building = final.with_suffix(".building")
      for leftover in (building, final):  # Of a killed build; a folder that lost bytes.
        shutil.rmtree(leftover, ignore_errors=True)
      building.mkdir()
      manifest = build(source, inputs, made, building)
      building.rename(final)
      sync(folder)
  finally:
    lock.release()
  return Prepared(final, made, manifest)


def _digest(*parts: Any) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _finished(folder: pathlib.Path) -> dict[str, Any] | None:
  """The manifest, if the folder is there and its files are those that were written."""
  try:
    manifest = read_json(folder / "manifest.json")
    return manifest if is_whole(folder, manifest) else None
  except OSError:
    return None


def _contents(inputs: list[Input]) -> list[tuple[str, bool | None, str]]:
  """What each file holds: (hash, side, how it is read). Where it lies does not matter.

  A file of the same path, size and time of change as before is not read again.
  """
  memo_path = root() / "hashes.json"
  found = read_json(memo_path)
  memo = found if isinstance(found, dict) else {}
  known, found = len(memo), []
  with Progress("hashing", sum(path.stat().st_size for path, _ in inputs)) as progress:
    for path, held_out in inputs:
      stat = path.stat()
      name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
      if name not in memo:
        digest = hashlib.sha256()
        with path.open("rb") as file:
          while chunk := file.read(2**24):
            digest.update(chunk)
            progress.advance(len(chunk))
        memo[name] = digest.hexdigest()
      else:
        progress.advance(stat.st_size)
      found.append((memo[name], held_out, kind_of(path) + path.suffix))
  if len(memo) > known:
    unfinished = memo_path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(memo))
    unfinished.replace(memo_path)
  return found


def _check_apart(inputs: list[Input], contents: list[tuple[str, bool | None, str]]) -> None:
  """Refuses files that are trained on and, by another name, held out."""
  sides = [
    {
      c[0]: i.path
      for i, c in zip(inputs, contents, strict=True)
      if c[1] is side and c[0] != NOTHING
    }
    for side in (False, True)
  ]
  if both := sorted(sides[0].keys() & sides[1].keys()):
    trained, held_out = (side[both[0]] for side in sides)
    raise Refused(
      f"{held_out} is held out, but holds what {trained} does, which is trained on; take one away"
    )


def _learning_texts(source: Austen | Files | PreparedText, inputs: list[Input]) -> Iterator[str]:
  """Training documents, evenly thinned to about LEARN_BYTES."""
  total = sum(path.stat().st_size for path, _ in inputs)
  every = max(1, round(total / LEARN_BYTES))
  with Progress("learning the tokenizer", total) as progress:
    documents = (d for d in source.documents(progress.advance) if isinstance(d, Document))
    texts = (d.text for d in documents if not d.held_out)
    yield from (text for i, text in enumerate(texts) if i % every == 0)
