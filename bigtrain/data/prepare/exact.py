"""Exact duplicates: documents with equal digests, of which the first one stays.

A task compares the digests of one residue class: it has 1/tasks of them in memory.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtrain.data.prepare.clean import cleaned, digests
from bigtrain.data.prepare.files import write_array, write_json

MOST = 10  # Of the most frequent ones are reported.


def exact(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: finds the documents that are equal to one before them, of digests = rank mod tasks.

  Leaves (task, index) of each, sorted.
  """
  folder = pathlib.Path(out)
  found = []
  for r in range(world_size):
    here = digests(folder, r)
    index = np.flatnonzero(here[:, 0] % np.uint64(world_size) == rank)
    rows = np.empty((len(index), 4), np.uint64)
    rows[:, :2], rows[:, 2], rows[:, 3] = here[index], r, index
    found.append(rows)
  high, low, task, index = np.concatenate(found).T
  order = np.lexsort((index, task, low, high))
  same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
  later = order[1:][same]
  dropped = np.stack([task[later], index[later]], 1).astype(np.int64)
  dropped = dropped[np.lexsort(dropped.T[::-1])]
  write_array(folder / "work" / "exact" / f"{rank:05}.npy", dropped)
  starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(order) else np.zeros(0, int)
  sizes = np.diff(np.append(starts, len(order)))
  most = [i for i in np.argsort(-sizes, kind="stable")[:MOST] if sizes[i] > 1]
  groups = [[int(sizes[i]), f"{int(high[order[starts[i]]]):016x}"] for i in most]
  write_json(folder / "work" / "exact" / f"{rank:05}.json", groups)


def dropped(folder: pathlib.Path, rank: int) -> np.ndarray:
  """The sorted indices of a task's cleaned documents that are equal to an earlier one."""
  found = [np.zeros(0, np.int64)]
  for path in sorted((folder / "work" / "exact").glob("*.npy")):
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
