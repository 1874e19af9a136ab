"""A mixture: rows of several sources, interleaved exactly by their weights.

Which source gives an example, and which of its examples that is, follow from the example's number:
in every block of examples each source has its exact share of places, dealt out by a keyed
permutation. Nothing is counted along the way, so any example is reached at once.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from etils import epath

from bigtrain.config import Refused, config, shortened
from bigtrain.data.shuffle import in_blocks, key_of, permute
from bigtrain.data.text import check_tokenizers
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.experiment import SOURCE, Data, DataConfig

if TYPE_CHECKING:
  import jax

BLOCK = 10_000  # Examples in which every source has its exact share, to 1 in 10,000.
BLOCKS = 8  # Remembered.
# What all sources have the same of, and how it is called.
SAME = {
  "vocabulary": "vocabulary",
  "row_length": "row length",
  "n_classes": "number of classes",
  "input_shape": "shape of inputs",
}
STREAM = 0x6D6978  # Keeps the order of sources apart from other orders of the same seed.


@config
class Source:
  """One part of a mixture."""

  name: str  # In metrics, as `loss/<name>`.
  data: DataConfig
  # Its share is its weight over the sum of all weights; None weighs it by its number of examples,
  # so that all such sources make epochs at one pace.
  weight: float | None = None
  epochs: float = 1.0  # How often its examples count, where they are its weight.


@config
class Mixture(DataConfig):
  """Sources with one row length and one tokenizer, each row from one of them."""

  sources: tuple[Source, ...]
  # Shares are weights^(1 / temperature), normalised: above 1 small sources are seen more often
  # (arXiv:1901.07291, arXiv:1907.05019).
  temperature: float = 1.0

  def make(self, seed: int) -> "Mixed":
    return Mixed(self, seed)

  def vocabulary(self) -> int | None:
    return self.sources[0].data.vocabulary()

  def row_length(self) -> int | None:
    return self.sources[0].data.row_length()

  def n_token_types(self) -> int | None:
    return max((s.data.n_token_types() or 0 for s in self.sources), default=0) or None

  def n_classes(self) -> int | None:
    return self.sources[0].data.n_classes()

  def input_shape(self) -> tuple[int, ...] | None:
    return self.sources[0].data.input_shape()

  def read_tokenizer(self, path: epath.Path) -> Tokenizer | None:
    return self.sources[0].data.read_tokenizer(path)

  def check(self) -> None:
    names = [source.name for source in self.sources]
    if not names or len(set(names)) < len(names) or not all(names):
      raise Refused(f"sources are named {names}: give one or more, each a name of its own")
    for source in self.sources:
      if source.weight is not None and not source.weight > 0:
        raise Refused(
          f"the source {source.name!r} has weight {source.weight}; give one above 0, or leave the "
          "source out"
        )
      if not source.epochs > 0:
        raise Refused(f"the source {source.name!r} has epochs {source.epochs}; give above 0")
      if source.weight is not None and source.epochs != 1.0:
        raise Refused(f"the source {source.name!r} has a weight and epochs; give one of them")
    if len({source.weight is None for source in self.sources}) > 1:
      raise Refused("some sources have a weight and some have none; give all one, or none")
    if not self.temperature > 0:
      raise Refused(f"temperature is {self.temperature}; it is above 0, and 1 changes nothing")
    for name, what in SAME.items():
      if len(found := {getattr(source.data, name)() for source in self.sources}) > 1:
        raise Refused(f"sources differ in {what}: {shortened(sorted(found, key=repr))}")
    check_tokenizers((source.data for source in self.sources), "sources")

  def smoke(self) -> Self:
    small = (dataclasses.replace(s, data=s.data.smoke()) for s in self.sources)
    return dataclasses.replace(self, sources=tuple(small))


class Mixed(Data):
  """Prepared sources, and the order in which they take turns."""

  def __init__(self, c: Mixture, seed: int):
    self.names = [source.name for source in c.sources]
    self.parts = [source.data.make(seed) for source in c.sources]
    self._c, self._seed = c, seed
    # The source of each example, and the example's number within it.
    self.order = in_blocks(self._block, BLOCK, BLOCKS)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """Places of each source in a block, (sources,)."""
    c = self._c
    weights = [
      source.epochs * self._ask(k, "examples") if source.weight is None else source.weight
      for k, source in enumerate(c.sources)
    ]
    counts = places(np.array(weights, np.float64) ** (1 / c.temperature), BLOCK)
    if not counts.all():
      raise Refused(
        f"the source {self.names[int(np.argmin(counts))]!r} has less than 1 in {BLOCK} of the "
        "examples; give it more weight, a higher temperature, or leave it out"
      )
    return counts

  def _block(self, block: int) -> np.ndarray:
    """Source and number within it, (2, BLOCK); each source's examples come in their own order."""
    slots = permute(np.arange(BLOCK), BLOCK, key_of(self._seed, STREAM, block))
    sources = np.searchsorted(np.cumsum(self.counts), slots, side="right")
    numbers = np.empty(BLOCK, np.int64)
    for k, count in enumerate(self.counts):
      numbers[sources == k] = block * count + np.arange(count)
    return np.stack([sources, numbers])

  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    import jax

    indicator = jax.ShapeDtypeStruct((size,), np.float32)
    return self.parts[0].spec(size) | {SOURCE + name: indicator for name in self.names}

  def batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    sources, numbers = self.order((example + np.arange(size))[rows or slice(None)])
    return self._rows("batch", sources, numbers)

  def eval_examples(self) -> int:
    return sum(self._all("eval_examples"))

  def eval_batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    wanted = (example + np.arange(size))[rows or slice(None)]
    ends = np.cumsum(self._all("eval_examples"))
    # Past the end is past the end of the last source, which pads.
    sources = np.minimum(np.searchsorted(ends, wanted, side="right"), len(ends) - 1)
    starts = np.concatenate([[0], ends[:-1]])
    return self._rows("eval_batch", sources, wanted - starts[sources])

  def examples(self) -> int:
    """Until the source that is seen the least often has been through its examples once."""
    shares = self.counts / BLOCK
    return int(np.ceil(np.array(self._all("examples")) / shares).max())

  def digest(self) -> str:
    return " ".join(map(str, self._all("digest")))

  def kept_out(self) -> str | None:
    return "; ".join(filter(None, self._all("kept_out"))) or None

  def about(self) -> str:
    shares = zip(self.names, self.counts / BLOCK, self._all("about"), strict=True)
    return "; ".join(f"{share:.1%} {name}: {about}" for name, share, about in shares)

  @property
  def tokenizer(self) -> Tokenizer:
    return self.parts[0].tokenizer

  def tokenizer_json(self) -> str | None:
    return self.parts[0].tokenizer_json()

  def _ask(self, k: int, method: str, *args) -> Any:
    """What a source's data says; what it refuses is said to be of that source."""
    try:
      return getattr(self.parts[k], method)(*args)
    except Refused as error:
      raise Refused(f"the source {self.names[k]!r}: {error}") from error

  def _all(self, method: str) -> list[Any]:
    return [self._ask(k, method) for k in range(len(self.parts))]

  def _rows(self, method: str, sources: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Those rows, each source's by one call: their numbers follow each other."""
    batch: dict[str, np.ndarray] = {}
    for k in set(sources.tolist()):
      here = np.flatnonzero(sources == k)
      for name, values in self._ask(k, method, int(numbers[here[0]]), len(here)).items():
        batch.setdefault(name, np.empty((len(sources), *values.shape[1:]), values.dtype))
        batch[name][here] = values
    return batch | {SOURCE + n: (sources == k).astype(np.float32) for k, n in enumerate(self.names)}


def places(weights: np.ndarray, block: int) -> np.ndarray:
  """Shares of a block in whole places, by the largest remainders."""
  exact = weights / weights.sum() * block
  counts = np.floor(exact).astype(np.int64)
  counts[np.argsort(counts - exact, kind="stable")[: block - counts.sum()]] += 1
  return counts
