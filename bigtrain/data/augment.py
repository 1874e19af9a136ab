"""Augmentation: random changes of training images, each a @config with a __call__.

A new one is a class like these, also in an experiment file. All take and return Pillow's images,
grey (L) or of three colours (RGB), and draw from a stream of their own, so that a change of one
leaves what the others draw as it was.
"""

import abc
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from bigtrain.config import Refused, config
from bigtrain.data.draws import Draws
from bigtrain.data.shuffle import hashes

Box = tuple[float, float, float, float]  # Left, top, right, bottom, in pixels.

TRIES = 10  # For a random rectangle that fits, as in the references below.


class Augmentation(abc.ABC):
  """A random change of a training image, a pure function of the image and the draws."""

  __slots__ = ()

  @abc.abstractmethod
  def __call__(self, image: Image.Image, draws: Draws) -> Image.Image:
    """The changed image, of the same size and mode."""

  def check(self) -> None: ...


@config
class RandomResizedCrop(Augmentation):
  """A random part of the image, resized to what the model sees (Szegedy et al. 2014).

  It stands first: no pixel outside of the part is resized, and of a large JPEG only as many
  frequencies are decoded as the size needs. arXiv:1409.4842, section 6.
  """

  area: tuple[float, float] = (0.08, 1.0)  # Of the part, as a share of the image.
  ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Of its width to its height.

  def __call__(self, image: Image.Image, draws: Draws) -> Image.Image:
    return self.cropped(image, draws, image.width)

  def cropped(self, image: Image.Image, draws: Draws, size: int) -> Image.Image:
    """A random part at `size` x `size` pixels."""
    width, height = image.size
    if (found := rectangle(draws, width, height, self.area, self.ratio)) is None:
      # The largest centre part of an allowed ratio.
      ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
      w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
      found = (width - w) // 2, (height - h) // 2, w, h
    left, top, w, h = found
    return resized(image, (left, top, left + w, top + h), size)

  def check(self) -> None:
    check_rectangle(self.area, self.ratio)


@config
class HorizontalFlip(Augmentation):
  """Left and right exchanged."""

  probability: float = 0.5

  def __call__(self, image: Image.Image, draws: Draws) -> Image.Image:
    if draws.uniform() >= self.probability:
      return image
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

  def check(self) -> None:
    check_probability(self.probability)


@config
class PadCrop(Augmentation):
  """Padded with black on all sides, then cropped back at a random place: for small images.

  He et al. 2015, arXiv:1512.03385, section 4.2.
  """

  pixels: int = 4  # On each side.

  def __call__(self, image: Image.Image, draws: Draws) -> Image.Image:
    left, top = (draws.below(2 * self.pixels + 1) - self.pixels for _ in range(2))
    return image.crop((left, top, left + image.width, top + image.height))

  def check(self) -> None:
    if self.pixels < 1:
      raise Refused(f"pixels is {self.pixels}: at least 1, or leave PadCrop out")


@config
class RandomErasing(Augmentation):
  """A random rectangle replaced by noise (Zhong et al. 2017, arXiv:1708.04896)."""

  probability: float = 0.25
  area: tuple[float, float] = (0.02, 1 / 3)  # Of the rectangle, as a share of the image.
  ratio: tuple[float, float] = (0.3, 10 / 3)  # Of its width to its height.

  def __call__(self, image: Image.Image, draws: Draws) -> Image.Image:
    if draws.uniform() >= self.probability:
      return image
    if (found := rectangle(draws, *image.size, self.area, self.ratio)) is None:
      return image
    left, top, w, h = found
    pixels = np.array(image)
    hole = pixels[top : top + h, left : left + w]
    noise = hashes(np.uint64(draws.bits()), np.arange(hole.size)) >> np.uint64(56)
    hole[...] = noise.astype(np.uint8).reshape(hole.shape)
    return Image.fromarray(pixels)

  def check(self) -> None:
    check_probability(self.probability)
    check_rectangle(self.area, self.ratio)


@config
class RandAugment(Augmentation):
  """Operations drawn at random, all of one magnitude (Cubuk et al. 2019, arXiv:1909.13719).

  The operations are the paper's 14, at the ranges of AutoAugment (arXiv:1805.09501, table 6). What
  an operation uncovers is black.
  """

  operations: int = 2  # How many are applied, one after the other.
  magnitude: float = 9.0  # From 0, hardly a change, to 10.

  def __call__(self, image: Image.Image, draws: Draws) -> Image.Image:
    for _ in range(self.operations):
      name = OPERATIONS[draws.below(len(OPERATIONS))]
      sign = 1 if draws.bits() >> 63 else -1
      image = OPERATION[name](image, self.magnitude / 10, sign)
    return image

  def check(self) -> None:
    if self.operations < 1 or not 0 <= self.magnitude <= 10:
      raise Refused(
        f"{self.operations} operations of magnitude {self.magnitude}: there is at least 1, and the "
        "magnitude is from 0 to 10"
      )


Operation = Callable[[Image.Image, float, int], Image.Image]  # (image, share of the range, sign).


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  """The image whose pixel (x, y) is the old one at (ax + by + c, dx + ey + f)."""
  return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
  return lambda image, m, sign: kind(image).enhance(1 + sign * 0.9 * m)


OPERATION: dict[str, Operation] = {
  "identity": lambda image, m, sign: image,
  "auto_contrast": lambda image, m, sign: ImageOps.autocontrast(image),
  "equalize": lambda image, m, sign: ImageOps.equalize(image),
  "rotate": lambda image, m, sign: image.rotate(sign * 30 * m, Image.Resampling.BILINEAR),
  "solarize": lambda image, m, sign: ImageOps.solarize(image, round(256 * (1 - m))),
  "color": enhanced(ImageEnhance.Color),
  "posterize": lambda image, m, sign: ImageOps.posterize(image, 8 - round(4 * m)),
  "contrast": enhanced(ImageEnhance.Contrast),
  "brightness": enhanced(ImageEnhance.Brightness),
  "sharpness": enhanced(ImageEnhance.Sharpness),
  "shear_x": lambda image, m, sign: affine(image, (1, sign * 0.3 * m, 0, 0, 1, 0)),
  "shear_y": lambda image, m, sign: affine(image, (1, 0, 0, sign * 0.3 * m, 1, 0)),
  # 150 of the 331 pixels that AutoAugment's images had.
  "translate_x": lambda i, m, sign: affine(i, (1, 0, sign * 150 / 331 * m * i.width, 0, 1, 0)),
  "translate_y": lambda i, m, sign: affine(i, (1, 0, 0, 0, 1, sign * 150 / 331 * m * i.height)),
}
OPERATIONS = tuple(OPERATION)


def rectangle(
  draws: Draws,
  width: int,
  height: int,
  area: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int] | None:
  """Left, top, width and height of a random part of an image; None if none was found that fits.

  Its area is uniform, its ratio of sides uniform in the logarithm.
  """
  for _ in range(TRIES):
    size = draws.uniform(*area) * width * height
    sides = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(size * sides)), round(math.sqrt(size / sides))
    if 0 < w <= width and 0 < h <= height:
      return draws.below(width - w + 1), draws.below(height - h + 1), w, h
  return None


def resized(image: Image.Image, box: Box, size: int) -> Image.Image:
  """The part of an image in `box` at `size` x `size` pixels, by antialiased bicubic filtering.

  A JPEG that is not yet decoded is decoded at the half, quarter or eighth that still has `size`.
  """
  left, top, right, bottom = box
  if (left, top, right, bottom) == (0, 0, size, size) == (0, 0, *image.size):
    return image
  if image.format == "JPEG" and (scale := min(right - left, bottom - top) / size) >= 2:
    before = image.size
    image.draft(None, (int(before[0] / scale), int(before[1] / scale)))
    x, y = image.width / before[0], image.height / before[1]
    left, top, right, bottom = left * x, top * y, right * x, bottom * y
  box = left, top, min(right, image.width), min(bottom, image.height)
  return image.resize((size, size), Image.Resampling.BICUBIC, box)


def check_probability(probability: float) -> None:
  if not 0 <= probability <= 1:
    raise Refused(f"probability is {probability}: it is from 0 to 1")


def check_rectangle(area: tuple[float, float], ratio: tuple[float, float]) -> None:
  if not 0 < area[0] <= area[1] <= 1:
    raise Refused(f"area is {area}: shares, above 0 and at most 1, the smaller one first")
  if not 0 < ratio[0] <= ratio[1]:
    raise Refused(f"ratio is {ratio}: numbers above 0, the smaller one first")
