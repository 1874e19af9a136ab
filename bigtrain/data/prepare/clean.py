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
from bigtrain.data.prepare.steps import Rejected
from bigtrain.data.readers import Problem
from bigtrain.load import read

SAMPLES = 3  # Of each reason, a task.
EXCERPT = 700  # Characters of a sample.
CONTEXT = 80  # Characters around a change.
TAKEN = "lines taken out"  # Of a document that goes on without them.
BINS = 64  # Of the histograms: two for each doubling of a length in characters.


@dataclasses.dataclass
class Counts:
  """What one step did."""

  documents: int = 0
  changed: int = 0
  chars_in: int = 0
  chars_changed: int = 0  # How many more there are, in the documents that go on.
  seconds: float = 0.0
  rejected: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Samples:
  """A few documents for people to look at, chosen by a hash of their text."""

  def __init__(self, size: int = SAMPLES):
    self._size, self._heaps = size, collections.defaultdict(list)

  def add(self, kind: str, name: str, text: str) -> None:
    """A document."""
    self._put(kind, text, lambda: (name, text[:EXCERPT], len(text)))

  def add_change(self, kind: str, name: str, before: str, after: str) -> None:
    """The first place where a document differs before and after a step."""

    def excerpt() -> tuple[str, str, str]:
      pairs = enumerate(zip(before, after, strict=False))
      end = min(len(before), len(after))
      at = max(0, next((i for i, (a, b) in pairs if a != b), end) - CONTEXT // 2)
      return name, before[at : at + CONTEXT], after[at : at + CONTEXT]

    self._put(kind, before, excerpt)

  def _put(self, kind: str, text: str, make: Callable[[], tuple]) -> None:
    heap, order = self._heaps[kind], -int.from_bytes(digest(text)[:6], "big")
    if len(heap) < self._size:
      heapq.heappush(heap, (order, *make()))
    elif order > heap[0][0]:
      heapq.heapreplace(heap, (order, *make()))

  def dump(self) -> dict[str, list]:
    return {kind: sorted(heap, reverse=True) for kind, heap in sorted(self._heaps.items())}


def bin_of(length: int) -> int:
  """The histogram's bin of a length: bin b begins at 2**(b / 2)."""
  return int(2 * np.log2(max(length, 1)))


def recipe_of(out: str) -> Prepare:
  """The recipe in the folder, as tasks on any machine read it."""
  return read(out, Prepare)[0]


class Cleaning:
  """The steps that are on, one after another, and what each of them did."""

  def __init__(self, recipe: Prepare):
    on = [step for step in recipe.steps if step.on]
    self.names = [type(step).__name__ for step in on]
    self.counts = [Counts() for _ in on]
    self.changes = Samples()
    self.taken: dict[str, str] = {}  # By step, the lines that it took out of the last text.
    self._steps = [step.make() for step in on]
    self._takes_lines = [step.takes_lines for step in on]

  def __call__(self, text: str, name: str) -> tuple[str, str, str] | str:
    """The cleaned text; or, of one that a step rejects, that step, why, and what it was given."""
    self.taken = {}
    for i, (apply, count) in enumerate(zip(self._steps, self.counts, strict=True)):
      started = time.perf_counter()
      try:
        found = apply(text) or Rejected("empty")
      except Exception as error:
        error.add_note(f"in the step {self.names[i]}, of the document {name}")
        raise
      count.seconds += time.perf_counter() - started
      count.documents += 1
      count.chars_in += len(text)
      if isinstance(found, Rejected):
        count.rejected[found.reason] += 1
        return self.names[i], found.reason, text
      if found != text:
        count.changed += 1
        count.chars_changed += len(found) - len(text)
        self.changes.add_change(f"{i:03} {self.names[i]}", name, text, found)
        if self._takes_lines[i] and (lost := _lost(text, found)):
          self.taken[self.names[i]] = lost
      text = found
    return text


def _lost(before: str, after: str) -> str:
  """The lines that a text had before and has no more; blank ones left out."""
  left = collections.Counter(line.strip() for line in after.split("\n"))
  lost = []
  for line in filter(str.strip, before.split("\n")):
    if left[line.strip()]:
      left[line.strip()] -= 1
    else:
      lost.append(line)
  return "\n".join(lost)


def clean(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: reads and cleans every `world_size`-th input file from the `rank`-th on."""
  recipe, folder = recipe_of(out), pathlib.Path(out)
  cleaning, reading, samples = Cleaning(recipe), Counts(), Samples()
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
        reading.chars_in += len(found)
        before[bin_of(len(found))] += 1
        made = cleaning(found, name)
        for step, lost in cleaning.taken.items():
          rejected.add({"id": name, "step": step, "reason": TAKEN, "text": lost})
        if isinstance(made, str):
          kept.add({"id": name, "text": made})
          digests.write(digest(made))
          after[bin_of(len(made))] += 1
        else:
          step, reason, text = made
          samples.add(f"{step}: {reason}", name, text)
          rejected.add({"id": name, "step": step, "reason": reason, "text": text})
  spent = time.perf_counter() - started
  reading.seconds = max(0.0, spent - sum(c.seconds for c in cleaning.counts))
  stats = {
    "bytes": size,
    "read": vars(reading),
    "steps": [{"name": n, **vars(c)} for n, c in zip(cleaning.names, cleaning.counts, strict=True)],
    "lengths": {"read": before.tolist(), "cleaned": after.tolist()},
    "samples": samples.dump(),
    "changes": cleaning.changes.dump(),
  }
  write_json(folder / "work" / "clean" / f"{rank:05}.json", stats)


def cleaned(folder: pathlib.Path, rank: int) -> Iterator[dict[str, str]]:
  """The cleaned documents of a task, in order."""
  return read_lines(folder / "work" / "clean" / f"{rank:05}.jsonl.zst")


def digests(folder: pathlib.Path, rank: int) -> np.ndarray:
  """(documents, 2) big-endian uint64: the digest of each cleaned document, not in memory."""
  return mapped(folder / "work" / "clean" / f"{rank:05}.digests", ">u8", 2)


def task(function: Callable, out: pathlib.Path, *arguments: str):
  """A function of this package as a step of datatrove's, that any machine can unpickle."""
  return functools.partial(function, str(out), *arguments)
