"""Images with classes: decoded by Pillow, brought to one size, augmented, normalised.

What an image becomes in training is a function of (seed, example) alone; in evaluation of nothing
but the image. Orientation tags (EXIF) are not applied, as the common readers do not.

Dims: B batch, H height, W width, C channels.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from typing import Self

import numpy as np
from PIL import Image

from bigtrain.config import Refused, config
from bigtrain.data.augment import Augmentation, RandomResizedCrop, resized
from bigtrain.data.datasets import FashionMNISTSubset
from bigtrain.data.draws import Draws
from bigtrain.data.examples import ExampleData, Raw, Source
from bigtrain.experiment import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # Of ImageNet's training images, as everyone uses them.
IMAGENET_STD = (0.229, 0.224, 0.225)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
LOOK = 64  # Pixels of the side at which the survey decodes a JPEG: an eighth of most photographs.


@config
class ImageData(DataConfig):
  """`inputs` is float32 (B, size, size, channels).

  An image is brought to `size` by its centre crop, in training by `RandomResizedCrop` where that
  comes first in `augment`; the other augmentations see what the model sees.
  """

  source: Source
  size: int  # Pixels of height and width of what the model sees.
  channels: int = 3  # 1 grey, 3 colours; images of the other kind are converted.
  crop: float = 1.0  # Side of the centre crop, as a share of the shorter side; 0.875 is 224 of 256.
  augment: tuple[Augmentation, ...] = ()  # Of training images alone, in this order.
  mean: tuple[float, ...] = (0.5,)  # Of pixels from 0 to 1: one number, or one for each channel.
  std: tuple[float, ...] = (0.5,)  # Likewise.

  def make(self, seed: int) -> "Images":
    return Images(self, seed)

  def n_classes(self) -> int:
    return self.source.n_classes()

  def input_shape(self) -> tuple[int, int, int]:
    return self.size, self.size, self.channels

  def check(self) -> None:
    if self.size < 1:
      raise Refused(f"size is {self.size}: an image has at least 1 pixel")
    if self.channels not in (1, 3):
      raise Refused(f"channels is {self.channels}: images are grey (1) or have colours (3)")
    if not 0 < self.crop <= 1:
      raise Refused(f"crop is {self.crop}: a share is above 0 and at most 1")
    for name, values in (("mean", self.mean), ("std", self.std)):
      if len(values) not in (1, self.channels):
        said = f"one or {self.channels}" if self.channels > 1 else "one"
        raise Refused(f"{name} has {len(values)} numbers; images of {self.channels} want {said}")
    if min(self.std) <= 0:
      raise Refused(f"std is {self.std}: it is above 0")
    if any(isinstance(change, RandomResizedCrop) for change in self.augment[1:]):
      raise Refused("RandomResizedCrop comes first in augment: the others see what it made")
    shape = self.source.shape()
    if shape is not None and (len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,), (4,))):
      raise Refused(
        f"the source has examples of shape {shape}, which are no images; use FeatureData"
      )

  def smoke(self) -> Self:
    try:
      self.source.check()
    except Refused:  # The study's files are not on this machine, but its code can be tried.
      return dataclasses.replace(self, source=FashionMNISTSubset())
    return self


class Images(ExampleData):
  def __init__(self, c: ImageData, seed: int):
    ExampleData.__init__(self, c.source, {"inputs": (c.input_shape(), np.float32)}, seed)
    self._config, self._shape = c, c.input_shape()
    self.version = f"images 2 {c.source.shape()}"
    std = np.asarray(c.std, np.float32)
    self._scale_C, self._offset_C = 1 / (255 * std), np.asarray(c.mean, np.float32) / std

  def problem(self, raw: Raw) -> str | None:
    if isinstance(raw, np.ndarray):
      return (
        None if raw.dtype == np.uint8 else f"has pixels of {raw.dtype}, not uint8 from 0 to 255"
      )
    try:
      image = Image.open(io.BytesIO(raw), formats=FORMATS)
      wanted = self._config.source.shape()
      if wanted is not None and (image.height, image.width) != wanted[:2]:
        return f"has {image.height} x {image.width} pixels, not {wanted[0]} x {wanted[1]}"
      image.draft(None, (LOOK, LOOK))
      pixels(image)
    except Exception as error:  # Pillow's decoders raise many kinds.
      return problem_of(error)
    return None

  def inputs(self, raws: Sequence[Raw], keys: np.ndarray | None) -> dict[str, np.ndarray]:
    c = self._config
    changes = () if keys is None else c.augment
    if isinstance(raws, np.ndarray) and not changes and c.crop == 1.0:
      shape = len(raws), *self._shape
      if raws.shape == shape or (*raws.shape, 1) == shape:
        return self._batch(raws.reshape(shape))
    draws = [Draws(key) for key in (np.zeros(len(raws), int) if keys is None else keys).tolist()]
    # Decoding lets other threads run; what costs microseconds is quicker without them.
    several = self._pool.map if isinstance(raws[0], bytes) else map
    images = several(functools.partial(self._image, changes), raws, draws)
    return self._batch(np.stack(list(images)).reshape(len(raws), *self._shape))

  def _image(self, changes: tuple[Augmentation, ...], raw: Raw, draws: Draws) -> np.ndarray:
    """Pixels of one image, uint8 (size, size[, channels])."""
    c = self._config
    image, first = opened(raw), 0
    if changes and isinstance(changes[0], RandomResizedCrop):
      image, first = changes[0].cropped(image, draws.fork(0), c.size), 1
    else:
      image = centre_crop(image, c.crop, c.size)
    if image.mode != (mode := "L" if c.channels == 1 else "RGB"):
      image = image.convert(mode)
    for i, change in enumerate(changes[first:], first):
      image = change(image, draws.fork(i))
    return np.asarray(image)

  def _batch(self, pixels_BHWC: np.ndarray) -> dict[str, np.ndarray]:
    x_BHWC = pixels_BHWC.astype(np.float32)
    x_BHWC *= self._scale_C
    x_BHWC -= self._offset_C
    return {"inputs": x_BHWC}

  @functools.cached_property
  def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")


class BadImage(Exception):
  """An image of a kind that is not taken."""


def opened(raw: Raw) -> Image.Image:
  """The image, grey or of three colours; a JPEG of these kinds is not yet decoded.

  Raises:
    BadImage, OSError and other errors of Pillow: it cannot be decoded.
  """
  if isinstance(raw, np.ndarray):
    return pixels(Image.fromarray(raw[..., 0] if raw.shape[2:] == (1,) else raw))
  image = Image.open(io.BytesIO(raw), formats=FORMATS)
  return image if image.format == "JPEG" and image.mode in ("L", "RGB") else pixels(image)


def pixels(image: Image.Image) -> Image.Image:
  """The decoded image, as grey (L) or three colours (RGB), whatever its mode.

  Of 16 bits the upper 8 are kept; what is transparent is laid on white.

  Raises:
    BadImage: it has a mode that is no picture for people, such as floating point.
  """
  image.load()
  if image.mode in ("L", "RGB"):
    return image
  if image.mode.startswith("I;16"):
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
  if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
    grey = image.mode in ("LA", "La", "1", "L")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("L" if grey else "RGB")
  if image.mode in ("1", "P", "CMYK", "YCbCr", "LAB", "HSV"):
    return image.convert("L" if image.mode == "1" else "RGB")
  raise BadImage(f"has pixels of mode {image.mode}, not grey or colours of 8 or 16 bits")


def problem_of(error: Exception) -> str:
  """A kind of bad image, without what differs from file to file."""
  if isinstance(error, BadImage):
    return str(error)
  if isinstance(error, Image.UnidentifiedImageError):
    return f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
  if isinstance(error, Image.DecompressionBombError):
    return "has too many pixels to decode safely"
  return "is damaged"


def centre_crop(image: Image.Image, share: float, size: int) -> Image.Image:
  """The centre square whose side is `share` of the shorter side, resized to `size` pixels."""
  width, height = image.size
  side = share * min(width, height)
  left, top = (width - side) / 2, (height - side) / 2
  return resized(image, (left, top, left + side, top + side), size)
