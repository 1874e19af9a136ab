"""Made-up batches in the shapes of a dataset, of which nothing is read.

Rows of tokens hold several documents of unequal length and end in padding of unequal length, so
that devices have different numbers of tokens and no row, shard or position is like another.

Dims: B batch, T position.
"""

import numpy as np

from bigtrain.config import config, configs
from bigtrain.experiment import SOURCE, Data, DataConfig, ModelConfig

SHARE = 0.8  # Of the tokens that are no padding, and of labelled rows: those with a weight.


@config
class Synthetic(DataConfig):
  """Random examples as `data` would give them to a model."""

  data: DataConfig
  vocab: int | None  # Tokens are below this.
  classes: int | None  # Labels are below this.
  token_types: int  # Types are below this.

  def make(self, seed: int) -> "SyntheticData":
    return SyntheticData(self, seed)

  def vocabulary(self) -> int | None:
    return self.vocab

  def row_length(self) -> int | None:
    return self.data.row_length()

  def n_classes(self) -> int | None:
    return self.classes

  def input_shape(self) -> tuple[int, ...] | None:
    return self.data.input_shape()


def made_up(data: DataConfig, model: ModelConfig) -> Synthetic:
  """Examples in the shapes of `data` for that model."""
  types = [node.token_types for _, node in configs(model) if hasattr(node, "token_types")]
  return Synthetic(
    data=data,
    vocab=model.vocabulary(),
    classes=model.n_classes() or data.n_classes(),
    token_types=min(types, default=1),
  )


class SyntheticData(Data):
  def __init__(self, c: Synthetic, seed: int):
    self.c, self.seed = c, seed
    self._data = c.data.make(seed)

  def spec(self, size):
    return self._data.spec(size)

  def batch(self, example, size, rows=None):
    wanted = (example + np.arange(size))[rows or slice(None)]
    made = [self._row(np.random.default_rng([self.seed, int(i)])) for i in wanted]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}

  def eval_examples(self) -> int:
    return 0

  def eval_batch(self, example, size, rows=None):
    raise NotImplementedError("a parity run evaluates nothing")

  def _row(self, r: np.random.Generator) -> dict[str, np.ndarray]:
    spec = self.spec(1)
    row = {}
    documents = int(r.integers(2, 5))  # Of a row, and of the targets that belong to it.
    for prefix in ("", "target_"):
      if (name := f"{prefix}segments") in spec:
        segments, positions = _packed(r, spec[name].shape[1], documents)
        row |= {name: segments, f"{prefix}positions": positions}
    real = row.get("target_segments", row.get("segments"))
    source = r.choice([name for name in spec if name.startswith(SOURCE)] or [""])
    for name, found in spec.items():
      shape = found.shape[1:]
      if name == "weights":
        weighs = r.random(shape) < SHARE
        row[name] = weighs & (real > 0) if real is not None and real.shape == shape else weighs
      elif name.startswith(SOURCE):
        row[name] = name == source
      elif name not in row:
        row[name] = self._values(r, name, shape, found.dtype)
    return {name: np.asarray(row[name], spec[name].dtype) for name in spec}

  def _values(self, r: np.random.Generator, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
    if np.issubdtype(dtype, np.floating):
      return r.normal(size=shape)
    tops = {"tokens": self.c.vocab, "targets": self.c.vocab, "labels": self.c.classes}
    tops["token_types"] = self.c.token_types
    return r.integers(tops.get(name) or 2, size=shape)


def _packed(r: np.random.Generator, length: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
  """Segments and positions (T,) of so many documents, or fewer where a row is too short.

  Padding is numbered as they are, so that it too sees the same in rows that are cut, where masks go
  by positions, as in whole ones: what layers report of all tokens can be compared.
  """
  end = length - int(r.integers(0, length // 4 + 1))
  starts = [0, *sorted(1 + r.permutation(end - 1)[: documents - 1]), end]
  at = np.arange(length)
  segments = np.searchsorted(starts, at, side="right")
  positions = at - np.asarray(starts)[segments - 1]
  return np.where(at < end, segments, 0), positions
