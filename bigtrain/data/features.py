"""Feature vectors with classes: rows of numbers, for a classifier of dense layers."""

from bigtrain.config import config
from bigtrain.data.examples import Source
from bigtrain.experiment import DataConfig


@config
class FeatureData(DataConfig):
  """Each example flattened to a vector: `inputs` is float32 (B, product of the source's shape)."""

  source: Source
  standardize: bool = True  # Each feature to mean 0 and variance 1 over the training examples.
