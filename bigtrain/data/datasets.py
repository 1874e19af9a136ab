"""Datasets that need no file of the user's: in the package, fetched by name, or made up.

Dims: N examples, C features, L classes.
"""

import hashlib
import math
import pathlib
from typing import ClassVar

import numpy as np

from bigtrain.config import Refused, config
from bigtrain.data.arrays import ArraySplit, idx_path, idx_split, read_idx
from bigtrain.data.cache import root
from bigtrain.data.examples import Opened, Source
from bigtrain.data.shuffle import hashes, key_of
from bigtrain.data.sources import CORPUS
from bigtrain.hints import command

# SHA-256 of the four files of the whole set, as Zalando Research published them.
FASHION_MNIST = {
  "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
  "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
  "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
  "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


@config
class FashionMNISTSubset(Source):
  """Grey 28x28 images of clothing in 10 classes, MIT licence (Xiao et al. 2017, arXiv:1708.07747).

  The first 450 training and 100 test images of each class, which are in the package.
  """

  names: ClassVar[tuple[str, ...]] = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
  )  # fmt: skip

  def n_classes(self) -> int:
    return 10

  def shape(self) -> tuple[int, ...]:
    return 28, 28

  def about(self) -> str:
    return "a subset of Fashion-MNIST"

  def open(self) -> Opened:
    return _fashion_mnist(CORPUS / "fashion_mnist")


@config
class FashionMNIST(FashionMNISTSubset):
  """All 60,000 + 10,000 images, once `bigtrain data fetch fashion_mnist` has got them."""

  def about(self) -> str:
    return "Fashion-MNIST"

  def check(self) -> None:
    if not all((fetched("fashion_mnist") / name).exists() for name in FASHION_MNIST):
      raise Refused(
        "Fashion-MNIST is not on this machine; get its 30 MB by "
        f"`{command('data fetch fashion_mnist')}`, or take FashionMNISTSubset, which is in the "
        "package"
      )

  def open(self) -> Opened:
    self.check()
    folder = fetched("fashion_mnist")
    for name, digest in FASHION_MNIST.items():
      if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
        raise Refused(f"{folder / name} is damaged; run `{command('data fetch fashion_mnist')}`")
    return _fashion_mnist(folder)


def _fashion_mnist(folder: pathlib.Path) -> Opened:
  return Opened(*(idx_split(str(folder / part), (28, 28)) for part in ("train", "t10k")))


@config
class Digits(Source):
  """1,797 grey 8x8 images of handwritten digits (Alpaydin and Kaynak 1998, UCI, CC BY 4.0).

  As scikit-learn carries them, times 15: pixels are multiples of 15 from 0 to 240. A fifth, chosen
  by a hash of the pixels, is held out.
  """

  def n_classes(self) -> int:
    return 10

  def shape(self) -> tuple[int, ...]:
    return 8, 8

  def about(self) -> str:
    return "digits of UCI"

  def open(self) -> Opened:
    prefix = str(CORPUS / "digits" / "digits")
    images = read_idx(idx_path(f"{prefix}-images-idx3-ubyte")) * np.uint8(15)
    return Opened(
      ArraySplit(images, read_idx(idx_path(f"{prefix}-labels-idx1-ubyte")), prefix), 0.2
    )


@config
class Synthetic(Source):
  """Made-up features with known classes: class l is a unit Gaussian around +m_l or around -m_l.

  The m_l are orthogonal, at `distance` from the origin. A class lies on both sides of every plane
  through the origin, so a linear model does no better than chance; the best possible classifier
  takes the largest |m_l . x|, and `best_accuracy` says how often it is right.
  """

  examples: int = 10_000  # For training.
  held_out: int = 2_000
  features: int = 100
  classes: int = 10
  distance: float = 4.0  # Of a centre from the origin, in standard deviations of a feature.
  seed: int = 0  # Of centres and examples.

  def n_classes(self) -> int:
    return self.classes

  def shape(self) -> tuple[int, ...]:
    return (self.features,)

  def about(self) -> str:
    return f"made-up features, best possible accuracy {self.best_accuracy():.1%}"

  def check(self) -> None:
    if not 2 <= self.classes <= self.features:
      raise Refused(
        f"{self.classes} classes in {self.features} features: there are at least 2, and no more "
        "than features, for their centres are orthogonal"
      )
    if self.examples < self.classes or self.held_out < 0 or self.distance < 0:
      raise Refused("each class has at least 1 example; held_out and distance are at least 0")

  def best_accuracy(self) -> float:
    """How often the best possible classifier is right.

    Along the centres' directions x has independent coordinates, z of its own class around
    `distance`, the others around 0: the integral of phi(z - distance) * P(|N(0, 1)| < |z|)^(L - 1).
    """
    z = np.linspace(-8, 8 + self.distance, 20_001)
    density = np.exp(-((z - self.distance) ** 2) / 2) / np.sqrt(2 * np.pi)
    within = np.array([math.erf(abs(x) / math.sqrt(2)) for x in z])
    return float((density * within ** (self.classes - 1)).sum() * (z[1] - z[0]))

  def open(self) -> Opened:
    n = self.examples + self.held_out
    directions_CL = np.linalg.qr(_normal(key_of(self.seed, 0), self.features, self.classes))[0]
    # Classes in turn: there are equally many of each.
    labels_N = np.arange(n) % self.classes
    signs_N = np.where(hashes(key_of(self.seed, 1), np.arange(n)) >> np.uint64(63), 1.0, -1.0)
    inputs_NC = _normal(key_of(self.seed, 2), n, self.features)
    inputs_NC += (self.distance * signs_N)[:, None] * directions_CL.T[labels_N]
    # Rounded, so that the last bit of a machine's logarithm does not show in the digest.
    inputs_NC = (np.round(inputs_NC * 1024) / 1024).astype(np.float32)
    split = lambda part: ArraySplit(inputs_NC[part], labels_N[part], "synthetic")
    return Opened(split(slice(self.examples)), split(slice(self.examples, None)))


def fetched(name: str) -> pathlib.Path:
  """Where `bigtrain data fetch` puts a dataset."""
  return root() / "datasets" / name


def _normal(key: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Normally distributed numbers (rows, columns) by Box and Muller's transform (1958)."""
  uniform = (hashes(key, np.arange(2 * rows * columns)) >> np.uint64(11)) / 2.0**53
  first, second = uniform.reshape(2, rows, columns)
  return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
