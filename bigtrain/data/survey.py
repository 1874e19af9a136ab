"""Survey: one look at every example before training, kept where looking is slow.

It finds the labels, a hash of each example's bytes (equal bytes are never both trained on and held
out; float64 counts as float32, which models see), and what is wrong with an example. Of encoded
images it decodes every one, once for ever: the result lies in the cache under a name made from what
was looked at.
"""

import concurrent.futures
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bigtrain.console import say, unless_quick
from bigtrain.data.cache import root

if TYPE_CHECKING:
  from bigtrain.data.examples import Split

FORMAT = 2  # Raised by whatever changes what is found.
CHUNK = 256  # Examples that a thread looks at in one go.

Problem = str | None  # What is wrong with an example.


class Survey(NamedTuple):
  """What was found, for N examples."""

  labels: np.ndarray  # (N,) int64.
  hashes: np.ndarray  # (N,) uint64, of the bytes.
  problems: dict[int, str]  # By the number of the example.


def survey(split: "Split", inspect: Callable[[Any], Problem], version: str) -> Survey:
  """Looks at every example of a split, or finds what an earlier look found.

  Args:
    split: the examples.
    inspect: says what is wrong with an example.
    version: changes with what `inspect` finds.
  """
  if split.key is None:
    return _look(split, inspect)
  from filelock import FileLock

  folder = root() / "surveys"
  folder.mkdir(parents=True, exist_ok=True)
  name = hashlib.sha256(repr((FORMAT, version, split.key)).encode()).hexdigest()[:32]
  path = folder / f"{name}.npz"
  with FileLock(folder / f"{name}.lock"):
    if not path.exists():
      found = _look(split, inspect)
      with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        problems = json.dumps({str(i): said for i, said in found.problems.items()})
        np.savez(file, labels=found.labels, hashes=found.hashes, problems=np.array(problems))
      os.replace(file.name, path)
  with np.load(path) as kept:
    problems = {int(i): said for i, said in json.loads(str(kept["problems"])).items()}
    return Survey(kept["labels"], kept["hashes"], problems)


def _look(split: "Split", inspect: Callable[[Any], Problem]) -> Survey:
  labels, hashes = np.zeros(len(split), np.int64), np.zeros(len(split), np.uint64)
  problems: dict[int, str] = {}

  def look(start: int) -> None:
    at = np.arange(start, min(start + CHUNK, len(split)))
    raws, labels[at] = split.read(at)
    for i, raw in zip(at.tolist(), raws, strict=True):
      if (said := inspect(raw)) is not None:
        problems[i] = said
      stored = raw if isinstance(raw, bytes) else _narrow(raw).data
      digest = hashlib.blake2b(stored, digest_size=8).digest()
      hashes[i] = int.from_bytes(digest, "little")

  tell = lambda: say(f"looking once at {len(split):,} examples, such as {split.where(0)}")
  with unless_quick(tell), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for _ in pool.map(look, range(0, len(split), CHUNK)):
      pass
  return Survey(labels, hashes, dict(sorted(problems.items())))


def _narrow(raw: np.ndarray) -> np.ndarray:
  with np.errstate(over="ignore"):
    return np.ascontiguousarray(raw, np.float32 if raw.dtype == np.float64 else None)
