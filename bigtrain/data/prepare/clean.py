"""Cleaning: documents read, sent through the steps one by one, and counted. The first stage.

A task leaves its share of the documents in clean/, their digests beside them, what was kept out in
rejected/, and its counts. One document at a time is in memory.
"""

import collections
import dataclasses
import functools
import heapq
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bigtrain.data.prepare.files import (
  digest,
  lines,
  mapped,
  read_json,
  read_lines,
  whole,
  write_json,
)
from bigtrain.data.prepare.readers import documents
from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.steps import Apply, Rejected
from bigtrain.data.readers import Problem
from bigtrain.load import read

SAMPLES = 3  # Of each reason, a task.
EXCERPT = 700  # Characters of a sample.
BINS = 64  # Of the histograms: two for each doubling of a length in characters.


@dataclasses.dataclass
class Counts:
  """What one step did."""

  documents: int = 0
  changed: int = 0
  chars_in: int = 0
  chars_out: int = 0
  seconds: float = 0.0
  rejected: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Samples:
  """A few documents for people to look at, chosen by a hash of their text."""

  def __init__(self, size: int = SAMPLES):
    self._size, self._heaps = size, collections.defaultdict(list)

  def add(self, kind: str, name: str, text: str) -> None:
    order = -int.from_bytes(digest(text)[:6], "big")
    heap, item = self._heaps[kind], (order, name, text[:EXCERPT], len(text))
    if len(heap) < self._size:
      heapq.heappush(heap, item)
    elif item > heap[0]:
      heapq.heapreplace(heap, item)

  def dump(self) -> dict[str, list]:
    return {kind: sorted(heap, reverse=True) for kind, heap in sorted(self._heaps.items())}


def bin_of(length: int) -> int:
  """The histogram's bin of a length: bin b begins at 2**(b / 2)."""
  return int(2 * np.log2(max(length, 1)))


def recipe_of(out: str) -> Prepare:
  """The recipe in the folder, as tasks on any machine read it."""
  return read(out, Prepare)[0]


def clean(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: reads and cleans every `world_size`-th input file from the `rank`-th on."""
  recipe, folder = recipe_of(out), pathlib.Path(out)
  names = [type(step).__name__ for step in recipe.steps if step.on]
  steps = [step.make() for step in recipe.steps if step.on]
  counts, reading, samples = [Counts() for _ in steps], Counts(), Samples()
  before, after = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
  size = 0

  def advance(n: int) -> None:
    nonlocal size
    size += n

  started = time.perf_counter()
  with (
    lines(folder / "work" / "clean" / f"{rank:05}.jsonl.zst") as kept,
    whole(folder / "work" / "clean" / f"{rank:05}.digests") as digests,
    lines(folder / "rejected" / f"clean-{rank:05}.jsonl.zst") as rejected,
  ):
    for path, *_ in read_json(folder / "work" / "inputs.json")[rank::world_size]:
      for n, found in enumerate(documents(pathlib.Path(path), recipe, advance)):
        name = f"{path}#{n}"
        if isinstance(found, Problem):
          reading.rejected[found.kind] += 1
          rejected.add({"id": name, "step": "read", "reason": found.kind, "detail": str(found)})
          continue
        reading.documents += 1
        reading.chars_out += len(found)
        before[bin_of(len(found))] += 1
        text, refusal = _through(found, steps, counts, name)
        if refusal is None:
          kept.add({"id": name, "text": text})
          digests.write(digest(text))
          after[bin_of(len(text))] += 1
        else:
          step = names[refusal[0]]
          samples.add(f"{step}: {refusal[1]}", name, text)
          rejected.add({"id": name, "step": step, "reason": refusal[1], "text": text})
  spent = time.perf_counter() - started
  reading.seconds = max(0.0, spent - sum(c.seconds for c in counts))
  stats = {
    "bytes": size,
    "read": vars(reading),
    "steps": [{"name": n, **vars(c)} for n, c in zip(names, counts, strict=True)],
    "lengths": {"read": before.tolist(), "cleaned": after.tolist()},
    "samples": samples.dump(),
  }
  write_json(folder / "work" / "clean" / f"{rank:05}.json", stats)


def _through(
  text: str, steps: list[Apply], counts: list[Counts], name: str
) -> tuple[str, tuple[int, str] | None]:
  """The text after the steps; or as the step found it that rejected it, with that and why."""
  for i, (apply, count) in enumerate(zip(steps, counts, strict=True)):
    started = time.perf_counter()
    try:
      found = apply(text) or Rejected("empty")
    except Exception as error:
      error.add_note(f"in steps.{i} of those that are on, at the document {name}")
      raise
    count.seconds += time.perf_counter() - started
    count.documents += 1
    count.chars_in += len(text)
    if isinstance(found, Rejected):
      count.rejected[found.reason] += 1
      return text, (i, found.reason)
    count.chars_out += len(found)
    count.changed += found != text
    text = found
  return text, None


def cleaned(folder: pathlib.Path, rank: int) -> Iterator[dict[str, str]]:
  """The cleaned documents of a task, in order."""
  return read_lines(folder / "work" / "clean" / f"{rank:05}.jsonl.zst")


def digests(folder: pathlib.Path, rank: int) -> np.ndarray:
  """(documents, 2) big-endian uint64: the digest of each cleaned document, not in memory."""
  return mapped(folder / "work" / "clean" / f"{rank:05}.digests", ">u8", 2)


def task(function: Callable, out: pathlib.Path, *arguments: str):
  """A function of this package as a step of datatrove's, that any machine can unpickle."""
  return functools.partial(function, str(out), *arguments)
