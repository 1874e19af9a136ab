"""Datasets that need no download: in the package, or made up."""

from bigtrain.config import config
from bigtrain.data.examples import Source


@config
class Digits(Source):
  """1,797 grey 8x8 images of digits in 10 classes."""


@config
class FashionMNIST(Source):
  """Grey 28x28 images of clothing in 10 classes."""

  whole: bool = False  # 60,000 + 10,000 as `bigtrain data fetch` got them, not 4,500 + 1,000.


@config
class Synthetic(Source):
  """Made-up feature vectors whose best possible accuracy is known."""

  examples: int = 10_000
  held_out: int = 2_000
  features: int = 100
  classes: int = 10
  distance: float = 4.0
  seed: int = 0
