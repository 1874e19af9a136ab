"""Lines that many documents share, such as menus and notices, are taken out of all of them.

They are counted after duplicates are gone, so that copies of a document do not count. A document
keeps the digest and the split of its whole text: a line that becomes frequent moves nothing.
"""

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigtrain.data.prepare.clean import cleaned, recipe_of, task
from bigtrain.data.prepare.engine import Stage
from bigtrain.data.prepare.exact import exact_residues
from bigtrain.data.prepare.files import digest, mapped, read_json, whole, write_array, write_json
from bigtrain.data.prepare.near import standing
from bigtrain.data.prepare.recipe import SharedLines

MOST = 10  # Of the most frequent ones are reported.


class Trimmed(NamedTuple):
  """A document without its shared lines."""

  text: str
  removed: list[str]


def stages(out: pathlib.Path, tasks: int) -> list[Stage]:
  return [
    Stage("lines", [task(lines_of, out)], tasks),
    Stage("shared", [task(shared, out)], tasks),
    Stage("residues", [task(residues, out)], tasks),
    Stage("again", [task(exact_residues, out)], tasks),
  ]


def lines_of(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: writes the hashes of the lines of its documents, each once a document."""
  folder, c = pathlib.Path(out), recipe_of(out).lines
  assert c is not None
  with whole(folder / "work" / "lines" / f"{rank:05}.hashes") as file:
    for text in _remaining(folder, rank):
      hashes = np.unique(_hashes(text.split("\n"), c.min_chars))
      file.write(hashes[hashes > 0].tobytes())


def shared(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: of the line hashes = rank mod tasks, leaves those of enough documents, sorted."""
  folder, c = pathlib.Path(out), recipe_of(out).lines
  assert c is not None
  found = [np.zeros(0, np.uint64)]
  for r in range(world_size):
    hashes = mapped(folder / "work" / "lines" / f"{r:05}.hashes", "<u8", 1)[:, 0]
    found.append(hashes[hashes % np.uint64(world_size) == rank])
  values, counts = np.unique(np.concatenate(found), return_counts=True)
  values, counts = values[counts >= c.documents], counts[counts >= c.documents]
  write_array(folder / "work" / "shared" / f"{rank:05}.npy", values)
  most = np.argsort(-counts, kind="stable")[:MOST]
  write_json(
    folder / "work" / "shared" / f"{rank:05}.json", [[int(counts[i]), int(values[i])] for i in most]
  )


def residues(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: writes digests of its documents without shared lines, and of their clusters."""
  folder = pathlib.Path(out)
  trim = Trim(folder, recipe_of(out).lines)
  there = standing(folder, rank)
  clusters = there.cluster[there.kept]
  with whole(folder / "work" / "residues" / f"{rank:05}.digests") as file:
    for text, cluster in zip(_remaining(folder, rank), clusters, strict=True):
      file.write(digest(trim(text).text) + int(cluster).to_bytes(8, "big"))


class Trim:
  """Takes the shared lines out of a text."""

  def __init__(self, folder: pathlib.Path, c: SharedLines | None):
    paths = sorted((folder / "work" / "shared").glob("*.npy"))
    parts = [np.zeros(0, np.uint64), *map(np.load, paths)]
    self._shared, self._min_chars = np.sort(np.concatenate(parts)), c.min_chars if c else 0

  def __call__(self, text: str) -> Trimmed:
    if not len(self._shared):
      return Trimmed(text, [])
    lines = text.split("\n")
    hashes = _hashes(lines, self._min_chars)
    at = np.minimum(np.searchsorted(self._shared, hashes), len(self._shared) - 1)
    gone = self._shared[at] == hashes
    if not gone.any():
      return Trimmed(text, [])
    kept = "\n".join(line for line, out in zip(lines, gone, strict=True) if not out)
    return Trimmed(kept.strip(), [line for line, out in zip(lines, gone, strict=True) if out])


def frequent(folder: pathlib.Path) -> dict[int, int]:
  """{hash: documents} of the lines that most documents share."""
  pairs = [p for path in (folder / "work" / "shared").glob("*.json") for p in read_json(path)]
  return {line: n for n, line in sorted(pairs, key=lambda p: (-p[0], p[1]))[:MOST]}


def hash_of(line: str) -> int:
  """Never 0, which stands for a line that is too short."""
  return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little") or 1


def _hashes(lines: list[str], min_chars: int) -> np.ndarray:
  bare = (line.strip() for line in lines)
  return np.array([hash_of(b) if len(b) >= min_chars else 0 for b in bare], np.uint64)


def _remaining(folder: pathlib.Path, rank: int) -> Iterator[str]:
  """The texts of a task's documents that are no duplicates."""
  for record, kept in zip(cleaned(folder, rank), standing(folder, rank).kept, strict=True):
    if kept:
      yield record["text"]
