"""Packing: what is left goes into ArrayRecord shards by split; what is not, into rejected/.

A document's split is decided by the digest that stands for its cluster of near duplicates, its own
where it has none: the same whatever else is in the input, and on one side for all of a cluster.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtrain.data.prepare.clean import BINS, Samples, bin_of, cleaned, digests, recipe_of
from bigtrain.data.prepare.exact import dropped
from bigtrain.data.prepare.files import PART, lines, read_json, write_array, write_json
from bigtrain.data.prepare.recipe import Prepare

SPLITS = ("train", "validation", "test")
GROUP = 64  # Records that ArrayRecord compresses together.
KEPT = 5  # Samples of what is kept.


def split_of(cluster: np.ndarray, recipe: Prepare) -> np.ndarray:
  """The index into SPLITS for uint64 digests: validation is the lowest share of them, then test."""
  share = cluster.astype(np.float64) / 2.0**64
  held_out = np.where(share < recipe.validation + recipe.test, 2, 0)
  return np.where(share < recipe.validation, 1, held_out)


class Shards:
  """The shards of one split that one task writes: JSON records with id, digest and text."""

  def __init__(self, folder: pathlib.Path, split: str, rank: int, shard_bytes: int):
    self._name = f"{split}-{rank:05}"
    self._folder, self._limit = folder, shard_bytes
    self._writer, self._size = None, 0
    self.done: list[dict[str, Any]] = []

  def add(self, record: dict[str, str]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    if self._writer is None:
      path = self._folder / f"{self._name}-{len(self.done):05}.array_record"
      self.done.append({"file": path.name, "documents": 0, "bytes": 0})
      self._path, self._part = path, path.with_name(f"{path.name}{PART}")
      self._writer = ArrayRecordWriter(str(self._part), f"group_size:{GROUP}")
    self._writer.write(json.dumps(record, ensure_ascii=False).encode())
    size = len(record["text"].encode())
    self.done[-1]["documents"] += 1
    self.done[-1]["bytes"] += size
    self._size += size
    if self._size >= self._limit:
      self.close()

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()
      with self._part.open("rb") as file:
        self.done[-1]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
      self._part.replace(self._path)
      self._writer, self._size = None, 0


def pack(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: writes the shards of its documents, and where each of them went."""
  recipe, folder = recipe_of(out), pathlib.Path(out)
  started = time.perf_counter()
  (folder / "shards").mkdir(exist_ok=True)
  shards = [Shards(folder / "shards", name, rank, recipe.shard_bytes) for name in SPLITS]
  own = digests(folder, rank)
  equal = np.zeros(len(own), bool)
  equal[dropped(folder, rank)] = True
  cluster, near = _clusters(folder, rank, own, equal)
  split, wanted = split_of(cluster, recipe), _most(folder)
  samples, excerpts = Samples(KEPT), {}
  lengths = np.zeros(BINS, np.int64)
  with lines(folder / "rejected" / f"duplicates-{rank:05}.jsonl.zst") as rejected:
    for i, record in enumerate(cleaned(folder, rank)):
      name, text = record["id"], record["text"]
      if equal[i] or near[i]:
        reason = "exact duplicate" if equal[i] else "near duplicate"
        of = f"{int(own[i, 0] if equal[i] else cluster[i]):016x}"
        samples.add(reason, name, text)
        rejected.add({"id": name, "step": reason, "reason": reason, "of": of, "text": text})
        continue
      digest = f"{int(own[i, 0]):016x}{int(own[i, 1]):016x}"
      shards[split[i]].add({"id": name, "digest": digest, "text": text})
      samples.add("kept", name, text)
      lengths[bin_of(len(text))] += 1
      if digest[:16] in wanted:
        excerpts[digest[:16]] = [name, text[:200]]
  for made in shards:
    made.close()
  write_array(
    folder / "assignment" / f"{rank:05}.npy",
    np.stack([own[~equal, 0].astype(np.uint64), cluster[~equal].astype(np.uint64)], 1),
  )
  stats = {
    "shards": {name: made.done for name, made in zip(SPLITS, shards, strict=True)},
    "duplicates": {"exact": int(equal.sum()), "near": int(near.sum())},
    "lengths": lengths.tolist(),
    "samples": samples.dump(),
    "excerpts": excerpts,
    "seconds": time.perf_counter() - started,
  }
  write_json(folder / "work" / "pack" / f"{rank:05}.json", stats)


def _clusters(folder: pathlib.Path, rank: int, own, equal) -> tuple[np.ndarray, np.ndarray]:
  """For each cleaned document the digest of its cluster, and whether another stands for that."""
  cluster, near = np.array(own[:, 0], np.uint64), np.zeros(len(own), bool)
  path = folder / "work" / "select" / f"{rank:05}.npy"
  if path.exists():
    rows = np.load(path)
    there = np.flatnonzero(~equal)[rows[:, 0].astype(np.int64)]
    cluster[there], near[there] = rows[:, 1], rows[:, 2] == 0
  return cluster, near


def _most(folder: pathlib.Path) -> set[str]:
  """The digests of the documents with the most duplicates."""
  work = folder / "work"
  paths = [*(work / "exact").glob("*.json"), *(work / "select").glob("most.json")]
  return {digest for path in paths for _, digest in read_json(path)}


def read_shard(path: pathlib.Path) -> Iterator[dict[str, str]]:
  """The records of one shard in order."""
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(path))
  try:
    total = reader.num_records()
    for start in range(0, total, GROUP):
      yield from map(json.loads, reader.read(range(start, min(start + GROUP, total))))
  finally:
    reader.close()


def learn_tokenizer(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: learns the tokenizer from the training split, evenly thinned, as tokenizer.json."""
  from bigtrain.data.cache import LEARN_BYTES

  recipe, folder = recipe_of(out), pathlib.Path(out)
  assert recipe.tokenizer is not None
  shards = sorted((folder / "shards").glob("train-*.array_record"))
  every = max(1, round(sum(path.stat().st_size for path in shards) / LEARN_BYTES))

  def texts() -> Iterator[str]:
    numbered = enumerate(record for path in shards for record in read_shard(path))
    return (record["text"] for i, record in numbered if i % every == 0)

  learned = recipe.tokenizer.make("prepared", texts, folder / "work" / "tokenizer")
  unfinished = folder / f"tokenizer.json{PART}"
  unfinished.write_text(learned.json or "")
  unfinished.replace(folder / "tokenizer.json")
