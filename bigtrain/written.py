"""What a save wrote, read back and compared with the digests of what was to be saved.

Each process reads its share, a block of an array at a time, and leaves what its blocks add to the
digests beside the arrays, in verified-<process>.json. The first process adds them up and compares;
then commit.json, the mark of a verified save, is written.
"""

import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from bigtrain import digest
from bigtrain.config import listed
from bigtrain.files import read_json, replace_json

COMMIT = "commit.json"
POLL = 0.2  # Seconds between looks for what other processes found.

Digests = Mapping[str, list[int]]


def commit(place: epath.Path, digests: Digests, share: float, within: float) -> int:
  """Reads back what is under `place`, and marks it as verified; returns how many arrays were read.

  Args:
    place: a finished save, which all processes see.
    digests: of every array, as `digest.of_arrays` gives them.
    share: of the arrays that are read, from 0 to 1; other saves take others.
    within: seconds that the other processes may take.

  Raises:
    OSError: what is there is not what was to be saved, or others did not say in time.
  """
  # By the step: hosts may have mounted the run under other paths.
  chosen = {name: x for name, x in digests.items() if _chance(f"{place.name}/{name}") < share}
  found = read_back(place, list(chosen), jax.process_index(), jax.process_count())
  if jax.process_count() > 1:
    replace_json(place / f"verified-{jax.process_index()}.json", found)
    if jax.process_index():
      return len(chosen)
    found = _together(place, found, time.monotonic() + within)
  if wrong := [name for name, sums in chosen.items() if found[name] != sums]:
    raise OSError(f"{listed(wrong)} read back from {place} are not what was saved")
  mark(place)
  return len(chosen)


def mark(place: epath.Path) -> None:
  """Marks a save as one that was found to be what was to be saved."""
  replace_json(place / COMMIT, {"time": round(time.time(), 3)})


def is_committed(place: epath.Path) -> bool:
  return (place / COMMIT).exists()


def read_back(place: epath.Path, names: list[str], process: int, of: int) -> dict[str, list[int]]:
  """What this process's blocks of the arrays of those names add to their digests."""
  if process == 0:
    _forget_pages(place)
  found, number = {}, 0
  for name in names:
    array = _open(place, name)
    total = np.zeros(digest.chunks(array.shape), np.uint32)
    for start, block in _blocks(array.shape, array.chunk_layout.read_chunk.shape or ()):
      if number % of == process:
        read = np.asarray(array[block].read().result())
        total += digest.of_block(read, array.shape, start)
      number += 1
    found[name] = total.tolist()
  return found


def _open(place: epath.Path, name: str) -> Any:
  import tensorstore

  base = os.fspath(place) if "://" in str(place) else f"file://{place}"
  kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
  return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


def _blocks(
  shape: tuple[int, ...], block: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
  """Where each block of the storage begins, and its slices."""
  for at in np.ndindex(*(-(-n // b) for n, b in zip(shape, block, strict=True))):
    start = tuple(i * b for i, b in zip(at, block, strict=True))
    yield start, tuple(slice(s, min(s + b, n)) for s, b, n in zip(start, block, shape, strict=True))


def _together(place: epath.Path, own: dict[str, list[int]], until: float) -> dict[str, list[int]]:
  """The sums of all processes."""
  total = {name: np.array(sums, np.uint32) for name, sums in own.items()}
  for process in range(1, jax.process_count()):
    path = place / f"verified-{process}.json"
    while (found := read_json(path)) is None:
      if time.monotonic() > until:
        raise OSError(f"process {process} did not say in time whether {place} is whole")
      time.sleep(POLL)
    for name, sums in found.items():
      total[name] += np.array(sums, np.uint32)
  return {name: sums.tolist() for name, sums in total.items()}


def _chance(text: str) -> float:
  """A number in [0, 1) that the text decides, the same on every process."""
  return zlib.crc32(text.encode()) / 2**32


def _forget_pages(place: epath.Path) -> None:
  """Lets the system drop its copies of local files in memory, so that the disk is what is read."""
  if "://" in str(place) or not hasattr(os, "posix_fadvise"):
    return
  for path in Path(place).rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
