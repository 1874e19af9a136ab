"""Draws docs/images/augmented.png: a few images, and what each augmentation makes of them.

`python tools/picture_of_augmentations.py` takes the embedded subset of Fashion-MNIST.
"""

import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bigtrain.data.augment import (
  Augmentation,
  HorizontalFlip,
  PadCrop,
  RandAugment,
  RandomErasing,
  RandomResizedCrop,
)
from bigtrain.data.datasets import FashionMNISTSubset
from bigtrain.data.vision import ImageData

FILE = pathlib.Path(__file__).parent.parent / "docs" / "images" / "augmented.png"
ROWS: tuple[tuple[str, tuple[Augmentation, ...]], ...] = (
  ("as stored", ()),
  ("PadCrop", (PadCrop(),)),
  ("HorizontalFlip", (HorizontalFlip(),)),
  ("RandomResizedCrop", (RandomResizedCrop(area=(0.3, 1.0)),)),
  ("RandAugment", (RandAugment(),)),
  ("RandomErasing", (RandomErasing(probability=1.0),)),
  ("four of them", (PadCrop(), HorizontalFlip(), RandAugment(), RandomErasing())),
)
COLUMNS, SCALE, GAP, MARGIN = 10, 2, 4, 150  # Images; pixels of a pixel; pixels; pixels of names.


def main() -> None:
  side = 28 * SCALE + GAP
  sheet = Image.new("L", (MARGIN + COLUMNS * side, len(ROWS) * side + GAP), 255)
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
  for row, (name, augment) in enumerate(ROWS):
    data = ImageData(source=FashionMNISTSubset(), size=28, channels=1, augment=augment).make(0)
    inputs_BHWC = data.batch(0, COLUMNS)["inputs"]
    draw.text((GAP, row * side + side // 2 - 8), name, fill=0, font=font)
    for column, x_HWC in enumerate(inputs_BHWC):
      pixels = np.uint8(np.round((x_HWC[..., 0] + 1) * 127.5)).repeat(SCALE, 0).repeat(SCALE, 1)
      sheet.paste(Image.fromarray(pixels), (MARGIN + column * side, row * side + GAP))
  sheet.save(FILE, optimize=True)


if __name__ == "__main__":
  main()
