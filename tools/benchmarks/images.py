"""Images a second, from stored bytes to normalised batches, by size and augmentation.

`python tools/benchmarks/images.py [--batches N]` prints a table. Small images are the embedded
subset of Fashion-MNIST; photographs are made up: noise of falling spectrum at 500 x 375 pixels,
JPEG of quality 90, about as many bytes as one of ImageNet's. One caller reads batch after batch;
encoded images are decoded by as many threads as there are cores.
"""

import argparse
import io
import os
import time

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from bigtrain.config import config
from bigtrain.data.arrays import ArraySplit
from bigtrain.data.augment import (
  HorizontalFlip,
  PadCrop,
  RandAugment,
  RandomErasing,
  RandomResizedCrop,
)
from bigtrain.data.datasets import FashionMNISTSubset
from bigtrain.data.examples import Opened, Source
from bigtrain.data.vision import ImageData

BATCH, PHOTOGRAPHS = 64, 128
SMALL = (PadCrop(), HorizontalFlip())
LARGE = (RandomResizedCrop(), HorizontalFlip())
HEAVY = (RandAugment(), RandomErasing())


@config
class Photographs(Source):
  """Made-up JPEG images."""

  def n_classes(self) -> int:
    return 2

  def shape(self) -> None:
    return None

  def open(self) -> Opened:
    raws = np.empty(PHOTOGRAPHS, object)
    for i in range(PHOTOGRAPHS):
      raws[i] = photograph(np.random.default_rng(i))
    return Opened(ArraySplit(raws, np.arange(PHOTOGRAPHS) % 2, "photograph"), 0.0)


def photograph(r: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
  """A JPEG of noise whose amplitude falls with frequency, as that of natural images does."""
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
  noise = np.fft.rfft2(r.normal(size=(3, height, width))) / frequency**1.1
  x = np.fft.irfft2(noise, s=(height, width))
  pixels = np.clip(127.5 + 50 * x / x.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "jpeg", quality=90)
  return file.getvalue()


def main() -> None:
  parser = argparse.ArgumentParser(description="Images a second.")
  parser.add_argument("--batches", type=int, default=30, help="of 64 images, timed for each row")
  batches = parser.parse_args().batches
  size = np.mean([len(photograph(np.random.default_rng(i))) for i in range(8)])
  table = Table(title=f"{os.cpu_count()} cores; a photograph has {size / 1e3:.0f} kB")
  for column in ("images", "training", "images/s", "ms an image"):
    table.add_column(column, justify="left" if column in ("images", "training") else "right")
  small, large = FashionMNISTSubset(), Photographs()
  for name, data in (
    ("28 x 28, arrays", ImageData(source=small, size=28, channels=1)),
    ("28 x 28, arrays", ImageData(source=small, size=28, channels=1, augment=SMALL)),
    ("28 x 28, arrays", ImageData(source=small, size=28, channels=1, augment=SMALL + HEAVY)),
    ("224 x 224, JPEG", ImageData(source=large, size=224, crop=0.875)),
    ("224 x 224, JPEG", ImageData(source=large, size=224, augment=LARGE)),
    ("224 x 224, JPEG", ImageData(source=large, size=224, augment=LARGE + HEAVY)),
  ):
    made = data.make(0)
    made.batch(0, BATCH)
    begun = time.perf_counter()
    for i in range(1, batches + 1):
      made.batch(i * BATCH, BATCH)
    each = (time.perf_counter() - begun) / (batches * BATCH)
    changes = ", ".join(type(change).__name__ for change in data.augment) or "centre crop"
    table.add_row(name, changes, f"{1 / each:,.0f}", f"{each * 1e3:.3f}")
  console = Console()
  console.width = max(console.width, 100)
  console.print(table)


if __name__ == "__main__":
  main()
