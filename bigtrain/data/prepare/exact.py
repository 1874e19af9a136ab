"""Exact duplicates: documents with equal digests, of which one stays.

They are looked for twice: among the cleaned documents, and, where lines were taken out of them,
among what that left. A task compares the digests of one residue class: it has 1/tasks of them in
memory.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtrain.data.prepare.clean import cleaned, digests
from bigtrain.data.prepare.files import mapped, write_array, write_json

MOST = 10  # Of the most frequent ones are reported.


def exact(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: of cleaned documents that are equal the first stays; digests = rank mod tasks."""
  folder = pathlib.Path(out)
  find(folder, "exact", (digests(folder, r) for r in range(world_size)), rank, world_size)


def exact_residues(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: of documents that are equal without their shared lines, one stays.

  It is the one of the smallest cluster digest, so that all of them are in the split of that.
  """
  folder = pathlib.Path(out)
  paths = [folder / "work" / "residues" / f"{r:05}.digests" for r in range(world_size)]
  find(folder, "again", (mapped(path, ">u8", 3) for path in paths), rank, world_size)


def find(folder: pathlib.Path, name: str, of_tasks: Iterator[np.ndarray], part, parts) -> None:
  """Leaves (task, index) of each document but one of equal ones, sorted, in work/<name>.

  Args:
    folder: of the preparation.
    name: of the result.
    of_tasks: for each task (documents, 2 or 3): digests, and what decides which of equal ones
      stays, before their order does.
    part: the residue class of digests that is looked at.
    parts: how many there are.
  """
  found = []
  for r, here in enumerate(of_tasks):
    index = np.flatnonzero(here[:, 0] % np.uint64(parts) == part)
    rows = np.zeros((len(index), 5), np.uint64)
    rows[:, : here.shape[1]], rows[:, 3], rows[:, 4] = here[index], r, index
    found.append(rows)
  high, low, first, task, index = np.concatenate(found).T
  order = np.lexsort((index, task, first, low, high))
  same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
  later = order[1:][same]
  gone = np.stack([task[later], index[later]], 1).astype(np.int64)
  write_array(folder / "work" / name / f"{part:05}.npy", gone[np.lexsort(gone.T[::-1])])
  starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(order) else np.zeros(0, int)
  sizes = np.diff(np.append(starts, len(order)))
  most = [i for i in np.argsort(-sizes, kind="stable")[:MOST] if sizes[i] > 1]
  groups = [[int(sizes[i]), f"{int(high[order[starts[i]]]):016x}"] for i in most]
  write_json(folder / "work" / name / f"{part:05}.json", groups)


def dropped(folder: pathlib.Path, rank: int, name: str = "exact") -> np.ndarray:
  """The sorted indices of a task's documents that are equal to one that stays."""
  found = [np.zeros(0, np.int64)]
  for path in sorted((folder / "work" / name).glob("*.npy")):
    rows = np.load(path, mmap_mode="r")
    low, high = np.searchsorted(rows[:, 0], [rank, rank + 1])
    found.append(rows[low:high, 1])
  return np.sort(np.concatenate(found))


def survivors(out: str, _: Any, rank: int, world_size: int) -> Iterator[Any]:
  """A task's documents that are equal to none before them, as datatrove's."""
  from datatrove.data import Document

  folder = pathlib.Path(out)
  gone = set(dropped(folder, rank).tolist())
  for i, record in enumerate(cleaned(folder, rank)):
    if i not in gone:
      yield Document(text=record["text"], id=record["id"])
