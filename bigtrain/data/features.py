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
ROUNDING = 1e-12  # A standard deviation below this share of the mean is that of rounding.


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
  version = "features 2"

  def __init__(self, c: FeatureData, seed: int):
    ExampleData.__init__(self, c.source, {"inputs": (c.input_shape(), np.float32)}, seed)
    self._config = c

  def problem(self, raw: Raw) -> str | None:
    if isinstance(raw, bytes):
      return "is an encoded image, not a vector of features"
    if not np.isfinite(raw).all():
      return "has a feature that is NaN or infinite"
    with np.errstate(over="ignore"):
      fits = np.isfinite(raw.astype(np.float32)).all()
    return None if fits else "has a feature too large for float32"

  def inputs(self, raws: Sequence[Raw], keys: np.ndarray | None) -> dict[str, np.ndarray]:
    x_BC = np.asarray(raws).reshape(len(raws), -1)
    if self._config.standardize:
      # In float64: float32 would lose what differs where the mean is large.
      mean_C, scale_C = self._moments
      x_BC = (x_BC - mean_C) * scale_C
    return {"inputs": x_BC.astype(np.float32)}

  @functools.cached_property
  def _moments(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / standard deviation of each feature; 1 for one that never changes. float64."""
    split, at, _ = self._sides.train
    chunks = [at[i : i + CHUNK] for i in range(0, len(at), CHUNK)]
    read = lambda chunk: np.asarray(split.read(chunk)[0], np.float64).reshape(len(chunk), -1)
    mean_C = np.sum([read(chunk).sum(0) for chunk in chunks], 0) / len(at)
    squares = [np.square(read(chunk) - mean_C).sum(0) for chunk in chunks]
    variance_C = np.sum(squares, 0) / len(at)
    changes_C = variance_C > np.square(ROUNDING * mean_C)
    return mean_C, 1 / np.sqrt(np.where(changes_C, variance_C, 1))
