"""Feature vectors with classes: rows of numbers, for a classifier of dense layers.

Dims: B batch, C features.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Self

import numpy as np

from bigtrain.config import Refused, config
from bigtrain.data.datasets import Synthetic
from bigtrain.data.examples import ExampleData, Raw, Source
from bigtrain.experiment import DataConfig

CHUNK = 4096  # Examples read at once for mean and variance.


@config
class FeatureData(DataConfig):
  """Each example flattened to a vector: `inputs` is float32 (B, product of the source's shape)."""

  source: Source
  standardize: bool = True  # Each feature to mean 0 and variance 1 over the training examples.

  def make(self, seed: int) -> "Features":
    return Features(self, seed)

  def n_classes(self) -> int:
    return self.source.n_classes()

  def input_shape(self) -> tuple[int]:
    return (math.prod(self.source.shape() or ()),)

  def check(self) -> None:
    if self.source.shape() is None:
      raise Refused(
        f"{type(self.source).__name__} has images of any size, which are no vectors of features; "
        "use ImageData"
      )

  def smoke(self) -> Self:
    try:
      self.source.check()
    except Refused:  # The study's files are not on this machine, but its code can be tried.
      (features,) = self.input_shape()
      made_up = Synthetic(features=features, classes=min(features, self.n_classes()))
      return dataclasses.replace(self, source=made_up)
    return self


class Features(ExampleData):
  version = "features 1"

  def __init__(self, c: FeatureData, seed: int):
    ExampleData.__init__(self, c.source, {"inputs": (c.input_shape(), np.float32)}, seed)
    self._config = c

  def problem(self, raw: Raw) -> str | None:
    if isinstance(raw, bytes):
      return "is an encoded image, not a vector of features"
    return None if np.isfinite(raw).all() else "has a feature that is NaN or infinite"

  def inputs(self, raws: Sequence[Raw], keys: np.ndarray | None) -> dict[str, np.ndarray]:
    x_BC = self._flat(raws)
    if self._config.standardize:
      mean_C, scale_C = self._moments
      x_BC = (x_BC - mean_C) * scale_C
    return {"inputs": x_BC}

  def _flat(self, raws: Sequence[Raw]) -> np.ndarray:
    return np.asarray(raws, np.float32).reshape(len(raws), -1)

  @functools.cached_property
  def _moments(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / standard deviation of each feature; 1 for a feature that never changes."""
    split, at, _ = self._sides.train
    chunks = [at[i : i + CHUNK] for i in range(0, len(at), CHUNK)]
    read = lambda chunk: self._flat(split.read(chunk)[0]).astype(np.float64)
    mean_C = np.sum([read(chunk).sum(0) for chunk in chunks], 0) / len(at)
    squares = [np.square(read(chunk) - mean_C).sum(0) for chunk in chunks]
    variance_C = np.sum(squares, 0) / len(at)
    scale_C = 1 / np.sqrt(np.where(variance_C > 0, variance_C, 1))
    return mean_C.astype(np.float32), scale_C.astype(np.float32)
