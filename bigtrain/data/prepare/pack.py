"""Packing: what is left goes into ArrayRecord shards by split; what is not, into rejected/.

A document's split is decided by the digest that stands for its cluster of near duplicates, its own
where it has none: the same whatever else is in the input, and on one side for all of a cluster.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtrain.data.prepare.clean import BINS, Samples, bin_of, cleaned, digests, recipe_of
from bigtrain.data.prepare.exact import dropped
from bigtrain.data.prepare.files import PART, lines, read_json, write_array, write_json
from bigtrain.data.prepare.near import Standing, standing
from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.shared_lines import Trim, frequent, hash_of

SPLITS = ("train", "validation", "test")
GROUP = 64  # Records that ArrayRecord compresses together.
KEPT = 5  # Samples of what is kept.
EXACT, NEAR = "exact duplicate", "near duplicate"
# Of lines that many documents share; LINES is the reason of what was taken out, not of a document.
LINES, ONLY_SHARED, RESIDUE = "shared lines", "only shared lines", "equal without shared lines"


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
  (folder / "shards").mkdir(exist_ok=True)
  shards = [Shards(folder / "shards", name, rank, recipe.shard_bytes) for name in SPLITS]
  there, own = standing(folder, rank), digests(folder, rank)
  reasons = _reasons(folder, rank, there)
  split, wanted, lines_wanted = split_of(there.cluster, recipe), _most(folder), frequent(folder)
  trim = Trim(folder, recipe.lines)
  samples, excerpts, line_texts = Samples(KEPT), {}, {}
  counts, lengths = collections.Counter(), np.zeros(BINS, np.int64)
  with lines(folder / "rejected" / f"duplicates-{rank:05}.jsonl.zst") as rejected:
    for i, record in enumerate(cleaned(folder, rank)):
      name, (text, removed) = record["id"], trim(record["text"])
      for line in removed:
        if (hashed := hash_of(line.strip())) in lines_wanted:
          line_texts[hashed] = line.strip()
      reason = ONLY_SHARED if removed and not text else reasons[i]
      if reason:
        of = f"{int(own[i, 0] if there.equal[i] else there.cluster[i]):016x}"
        counts[reason] += 1
        samples.add(reason, name, record["text"])
        rejected.add(
          {"id": name, "step": reason, "reason": reason, "of": of, "text": record["text"]}
        )
        continue
      if removed:
        counts["trimmed"] += 1
        counts["chars removed"] += len(record["text"]) - len(text)
        rejected.add({"id": name, "step": LINES, "reason": LINES, "text": "\n".join(removed)})
      digest = f"{int(own[i, 0]):016x}{int(own[i, 1]):016x}"
      shards[split[i]].add({"id": name, "digest": digest, "text": text})
      samples.add("kept", name, text)
      lengths[bin_of(len(text))] += 1
      if digest[:16] in wanted:
        excerpts[digest[:16]] = [name, text[:200]]
  for made in shards:
    made.close()
  assigned = np.stack([own[:, 0].astype(np.uint64), there.cluster], 1)[~there.equal]
  write_array(folder / "assignment" / f"{rank:05}.npy", assigned)
  stats = {
    "shards": {name: made.done for name, made in zip(SPLITS, shards, strict=True)},
    "counts": counts,
    "lengths": lengths.tolist(),
    "samples": samples.dump(),
    "excerpts": excerpts,
    "lines": line_texts,
  }
  write_json(folder / "work" / "pack" / f"{rank:05}.json", stats)


def _reasons(folder: pathlib.Path, rank: int, there: Standing) -> list[str]:
  """Why each cleaned document of a task is not kept; empty where it is."""
  found = np.where(there.equal, EXACT, np.where(there.near, NEAR, "")).astype(object)
  found[np.flatnonzero(there.kept)[dropped(folder, rank, "again")]] = RESIDUE
  return found.tolist()


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
  """The task: learns the tokenizer from the training split, evenly thinned, as tokenizer.json.

  Of no text it learns none.
  """
  from bigtrain.data.cache import LEARN_BYTES

  recipe, folder = recipe_of(out), pathlib.Path(out)
  assert recipe.tokenizer is not None
  shards = sorted((folder / "shards").glob("train-*.array_record"))
  if not shards:
    return
  every = max(1, round(sum(path.stat().st_size for path in shards) / LEARN_BYTES))

  def texts() -> Iterator[str]:
    numbered = enumerate(record for path in shards for record in read_shard(path))
    return (record["text"] for i, record in numbered if i % every == 0)

  learned = recipe.tokenizer.make("prepared", texts, folder / "work" / "tokenizer")
  unfinished = folder / f"tokenizer.json{PART}"
  unfinished.write_text(learned.json or "")
  unfinished.replace(folder / "tokenizer.json")
