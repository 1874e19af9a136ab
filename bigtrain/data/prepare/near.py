"""Near duplicates: datatrove's MinHash, the documents that meet compared exactly, their clusters.

Stages: signatures (every document), bands (which documents meet in one), shingles (of those),
verified (pairs at or above the threshold), clusters. Memory grows with the duplicates alone.
"""

import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigtrain.data.prepare.clean import digests, recipe_of, task
from bigtrain.data.prepare.engine import Stage
from bigtrain.data.prepare.exact import dropped, survivors
from bigtrain.data.prepare.files import whole, write_array, write_json
from bigtrain.data.prepare.recipe import NearDuplicates

PAIR = struct.Struct("<4I")  # (task, document, task, document), as datatrove writes it.
# A word; in scripts without spaces a letter.
WORD = re.compile(
  r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
  r"|(?:(?![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])\S)+"
)
MOST = 10
# Of the documents that one has met in a band, it is compared with the last ones: work grows with
# the square of this number at most, then in proportion to the documents.
COMPARED = 1000
SHINGLES = 4096  # Hashed at once.


class Words:
  """Splits simplified text at its spaces; in place of spaCy, and for any script."""

  def word_tokenize(self, text: str) -> list[str]:
    return WORD.findall(text)


def signing(c: NearDuplicates, folder: pathlib.Path) -> Any:
  """datatrove's step that writes the signatures."""
  from datatrove.pipeline.dedup import MinhashDedupSignature

  class InBlocks(MinhashDedupSignature):
    """Of a long document the hashes of all shingles at once would take 2 GB for each 10 MB."""

    def get_signature(self, shingles):
      of = super().get_signature
      blocks = range(0, len(shingles), SHINGLES)
      return np.min([of(shingles[i : i + SHINGLES]) for i in blocks], axis=0).tolist()

  step = InBlocks(str(folder / "work" / "signatures"), _settings(c))
  step.word_tokenizer = Words()  # pyright: ignore[reportAttributeAccessIssue]
  return step


def _settings(c: NearDuplicates) -> Any:
  from datatrove.pipeline.dedup.minhash import MinhashConfig
  from datatrove.utils.hashing import HashConfig

  return MinhashConfig(
    n_grams=c.words,
    num_buckets=c.bands,
    hashes_per_bucket=c.rows,
    seed=c.seed,
    hash_config=HashConfig(hash_fc="sha1"),  # datatrove's default breaks with xxhash 4.
  )


def stages(c: NearDuplicates, out: pathlib.Path, tasks: int) -> list[Stage]:
  from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster

  work = out / "work"
  bands = MinhashDedupBuckets(
    str(work / "signatures"), str(work / "bands"), config=_settings(c), lines_to_buffer=1000
  )
  cluster = MinhashDedupCluster(
    str(work / "verified"), str(work / "clusters"), config=_settings(c), save_cluster_id=True
  )
  return [
    Stage("signatures", [task(survivors, out), signing(c, out)], tasks),
    Stage("bands", [bands], c.bands),
    Stage("shingles", [task(survivors, out), task(shingles, out)], tasks),
    Stage("verified", [task(verify, out)], c.bands),
    Stage("clusters", [cluster, task(select, out)], 1),
  ]


def groups(pairs: np.ndarray) -> Iterator[list[tuple[int, int]]]:
  """The documents that meet in a band, as (task, document): a pair links each to the next."""
  begins = np.append(True, (pairs[1:, :2] != pairs[:-1, 2:]).any(1))[: len(pairs)]
  for chain in np.split(pairs, np.flatnonzero(begins)[1:]) if len(pairs) else ():
    yield [tuple(chain[0, :2].tolist()), *map(tuple, chain[:, 2:].tolist())]


def similar(one: np.ndarray, two: np.ndarray, threshold: float) -> bool:
  """Whether two sets, sorted, have at least that Jaccard similarity."""
  few, many = sorted((one, two), key=len)
  if not len(few) or len(few) < threshold * len(many):
    return False
  at = np.minimum(np.searchsorted(many, few), len(many) - 1)
  shared = np.count_nonzero(many[at] == few)
  return bool(shared >= threshold * (len(few) + len(many) - shared))


def joined(sets: list[np.ndarray], threshold: float, counts: dict[str, int]) -> Iterator[tuple]:
  """Pairs of indices of similar sets, one for each two clusters that they make one."""
  cluster = np.arange(len(sets))
  for i, own in enumerate(sets):
    first = max(0, i - COMPARED)
    counts["left_out"] += first
    recent, others = cluster[first:i], np.arange(first, i)
    while len(others):
      j, others = int(others[-1]), others[:-1]
      counts["pairs"] += 1
      if similar(own, sets[j], threshold):
        recent[recent == cluster[j]] = i
        others = others[cluster[others] != i]  # They are together already.
        yield j, i
      else:
        counts["below_threshold"] += 1


def _pairs(path: pathlib.Path) -> np.ndarray:
  """(n, 4) of `PAIR`."""
  return np.fromfile(path, "<u4").reshape(-1, 4)


def shingles(out: str, documents: Iterator[Any], rank: int, world_size: int) -> None:
  """The task: writes the sorted shingle hashes of the documents that stand in a pair."""
  folder = pathlib.Path(out)
  wanted = [np.zeros(0, np.uint32)]
  for path in sorted((folder / "work" / "bands").glob("*.dups")):
    pairs = _pairs(path)
    wanted += [pairs[pairs[:, side] == rank, side + 1] for side in (0, 2)]
  index = np.unique(np.concatenate(wanted))
  near = recipe_of(out).near
  assert near is not None
  step, there, ends = signing(near, folder), set(index.tolist()), [0]
  with whole(folder / "work" / "shingles" / f"{rank:05}.hashes") as file:
    for i, document in enumerate(documents):
      if i in there:
        hashes = np.unique(step.get_shingles(document.text))
        file.write(hashes.astype("<u8").tobytes())
        ends.append(ends[-1] + len(hashes))
  write_array(
    folder / "work" / "shingles" / f"{rank:05}.npy", np.stack([index, ends[:-1], ends[1:]])
  )


def verify(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: pairs that meet in one band and are at or above the threshold.

  Of similar documents so many that all of them are connected. datatrove's own pairs would not do:
  each is of neighbours, and those may be less similar than others that met with them.
  """
  folder, recipe = pathlib.Path(out), recipe_of(out)
  assert recipe.near is not None
  work = folder / "work"
  index = [np.load(work / "shingles" / f"{r:05}.npy") for r in range(recipe.tasks)]
  there = [work / "shingles" / f"{r:05}.hashes" for r in range(recipe.tasks)]
  hashes = [np.memmap(p, "<u8", "r") if p.stat().st_size else np.zeros(0, "<u8") for p in there]

  def of(r: int, document: int) -> np.ndarray:
    documents, starts, ends = index[r]
    at = np.searchsorted(documents, document)
    return np.asarray(hashes[r][starts[at] : ends[at]])

  [path] = (work / "bands").glob(f"{rank:05}_*.dups")
  counts = {"pairs": 0, "below_threshold": 0, "left_out": 0}
  with whole(work / "verified" / path.name) as file:
    for members in groups(_pairs(path)):
      sets = [of(*member) for member in members]
      for i, j in joined(sets, recipe.near.threshold, counts):
        file.write(PAIR.pack(*members[i], *members[j]))
  write_json(work / "verified" / f"{rank:05}.json", counts)


def select(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: of each cluster the document of the smallest digest stays, and names the cluster.

  That depends on the cluster's documents alone: not on their order, nor on other documents. Leaves
  (index among the task's survivors, high half of that digest, whether it stays) for each member.
  """
  folder = pathlib.Path(out)
  work = folder / "work"
  rows = [np.zeros((0, 5), np.uint64)]
  for path in sorted((work / "clusters").glob("*.clusters")):
    members = np.fromfile(path, "<u4").reshape(-1, 2)
    r = int(path.stem)
    own = np.delete(digests(folder, r), dropped(folder, r), axis=0)[members[:, 0]]
    here = np.empty((len(members), 5), np.uint64)
    here[:, 0], here[:, 1:3], here[:, 3], here[:, 4] = members[:, 1], own, r, members[:, 0]
    rows.append(here)
  found = np.concatenate(rows)
  found = found[np.lexsort(found.T[[4, 3, 2, 1, 0]])]
  first = np.append(True, np.diff(found[:, 0]) != 0)[: len(found)]
  sizes = np.diff(np.append(np.flatnonzero(first), len(found)))
  smallest = np.repeat(found[first, 1], sizes)
  for r in range(recipe_of(out).tasks):
    here = found[:, 3] == r
    mine = np.column_stack([found[here, 4], smallest[here], first[here]]).astype(np.uint64)
    write_array(work / "select" / f"{r:05}.npy", mine[np.argsort(mine[:, 0], kind="stable")])
  most = np.argsort(-sizes, kind="stable")[:MOST]
  groups = [[int(sizes[i]), f"{int(found[first][i, 1]):016x}"] for i in most]
  write_json(work / "select" / "most.json", groups)


class Standing(NamedTuple):
  """Of each cleaned document of a task, what the search for duplicates found; (documents,)."""

  cluster: np.ndarray  # High half of the smallest digest of the cluster; uint64.
  equal: np.ndarray  # Whether it is equal to a document before it.
  near: np.ndarray  # Whether another one stands for its cluster.

  @property
  def kept(self) -> np.ndarray:
    return ~(self.equal | self.near)


def standing(folder: pathlib.Path, rank: int) -> Standing:
  own = digests(folder, rank)
  equal = np.zeros(len(own), bool)
  equal[dropped(folder, rank)] = True
  cluster, near = np.array(own[:, 0], np.uint64), np.zeros(len(own), bool)
  path = folder / "work" / "select" / f"{rank:05}.npy"
  if path.exists():
    rows = np.load(path)
    there = np.flatnonzero(~equal)[rows[:, 0].astype(np.int64)]
    cluster[there], near[there] = rows[:, 1], rows[:, 2] == 0
  return Standing(cluster, equal, near)
