"""Augmentation."""

import abc

from bigtrain.config import config


class Augmentation(abc.ABC):
  """A random change of a training image, a pure function of (seed, example): a @config."""

  __slots__ = ()


@config
class RandomResizedCrop(Augmentation):
  """A random part of the image, resized to what the model sees; stands first."""

  area: tuple[float, float] = (0.08, 1.0)  # Of the part, as a share of the image.
  ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Of its width to its height.


@config
class HorizontalFlip(Augmentation):
  """Left and right exchanged."""

  probability: float = 0.5


@config
class PadCrop(Augmentation):
  """Padded with black on all sides, then cropped back at a random place."""

  pixels: int = 4


@config
class RandAugment(Augmentation):
  """`layers` operations drawn at random, of one magnitude (Cubuk et al. 2019, arXiv:1909.13719)."""

  layers: int = 2
  magnitude: float = 9.0  # From 0 to 10.


@config
class RandomErasing(Augmentation):
  """A random rectangle replaced (Zhong et al. 2017, arXiv:1708.04896)."""

  probability: float = 0.25
  area: tuple[float, float] = (0.02, 1 / 3)  # Of the rectangle, as a share of the image.
  ratio: tuple[float, float] = (0.3, 3.3)  # Of its width to its height.
