import io
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from bigtrain.config import Refused, config
from bigtrain.data.arrays import ArraySplit
from bigtrain.data.augment import HorizontalFlip, RandomResizedCrop, resized
from bigtrain.data.datasets import Digits, FashionMNISTSubset, Synthetic
from bigtrain.data.examples import Opened, Source
from bigtrain.data.vision import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  BadImage,
  ImageData,
  centre_crop,
  opened,
)
from bigtrain.validate import validate
from tests import toys


def smooth(height, width, channels=3):
  """A smooth picture, which filters and JPEG hardly change."""
  y, x, c = np.mgrid[:height, :width, :channels].astype(float)
  wave = np.sin(x / width * 5 + c) + np.cos(y / height * 4 - c)
  return np.uint8(np.round(127.5 + 60 * wave))


def encoded(image, kind="png", **settings):
  image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
  file = io.BytesIO()
  image.save(file, kind, **settings)
  return file.getvalue()


def test_pixels_are_normalised_channel_by_channel():
  source = FashionMNISTSubset()
  images, labels = source.open().held_out.read(np.arange(6))
  plain = ImageData(source=source, size=28, channels=1, mean=(0.2,), std=(0.5,)).make(0)
  batch = plain.eval_batch(0, 6)
  np.testing.assert_allclose(batch["inputs"][..., 0], (images / 255 - 0.2) / 0.5, atol=1e-6)
  np.testing.assert_array_equal(batch["labels"], labels)
  colours = ImageData(source=source, size=28, mean=IMAGENET_MEAN, std=IMAGENET_STD).make(0)
  wanted = (images[..., None] / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
  np.testing.assert_allclose(colours.eval_batch(0, 6)["inputs"], wanted, atol=1e-5)


def test_images_of_the_right_size_take_the_same_values_with_and_without_the_short_way():
  source = Digits()
  short = ImageData(source=source, size=8, channels=1).make(0)
  never = ImageData(source=source, size=8, channels=1, augment=(HorizontalFlip(probability=0.0),))
  for a, b in ((short.batch(9, 40), never.make(0).batch(9, 40)),):
    np.testing.assert_array_equal(a["inputs"], b["inputs"])


def test_evaluation_is_pillows_resize_of_the_centre():
  image = Image.fromarray(smooth(50, 80))
  ours = np.asarray(centre_crop(image, 0.8, 20))  # 40 of 50 pixels, at 20 by 5.
  theirs = image.crop((20, 5, 60, 45)).resize((20, 20), Image.Resampling.BICUBIC)
  np.testing.assert_allclose(ours.astype(int)[1:-1, 1:-1], np.asarray(theirs)[1:-1, 1:-1], atol=1)
  assert np.asarray(centre_crop(Image.fromarray(smooth(28, 28)), 1.0, 28)).tolist() == (
    smooth(28, 28).tolist()
  )


def test_a_large_jpeg_is_decoded_at_a_fraction_with_nearly_the_same_result():
  data = encoded(smooth(640, 960), "jpeg", quality=95)
  box, size = (100, 50, 740, 600), 64
  lazy, whole = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
  whole.load()
  fast, slow = resized(lazy, box, size), resized(whole, box, size)
  assert lazy.size == (120, 80)  # An eighth was decoded.
  assert np.abs(np.asarray(fast).astype(int) - np.asarray(slow)).max() <= 3


@pytest.mark.parametrize(
  ("mode", "wanted"),
  [
    ("L", ("L", [100, 200])),
    ("1", ("L", [0, 255])),
    ("RGB", ("RGB", [[10, 20, 30], [200, 100, 0]])),
    ("P", ("RGB", [[10, 20, 30], [200, 100, 0]])),
    ("RGBA", ("RGB", [[10, 20, 30], [255, 255, 255]])),
    ("LA", ("L", [100, 255])),
    ("I;16", ("L", [1, 255])),
  ],
)
def test_every_usual_mode_becomes_grey_or_three_colours(mode, wanted):
  colours = Image.fromarray(np.uint8([[[10, 20, 30], [200, 100, 0]]]))
  grey = Image.fromarray(np.uint8([[100, 200]]))
  images = {
    "L": grey,
    "1": Image.fromarray(np.uint8([[0, 255]])).convert("1"),
    "RGB": colours,
    "P": colours.quantize(2),
    "RGBA": colours.copy(),
    "LA": grey.copy(),
    "I;16": Image.fromarray(np.uint16([[300, 65535]])),
  }
  if mode in ("RGBA", "LA"):  # The second pixel is transparent: white shows through.
    images[mode].putalpha(Image.fromarray(np.uint8([[255, 0]])))
  assert images[mode].mode == mode
  found = opened(encoded(images[mode]))
  assert (found.mode, np.asarray(found)[0].tolist()) == wanted


def test_a_jpeg_for_print_becomes_the_colours_it_was_made_of():
  picture = Image.fromarray(smooth(32, 32))
  found = opened(encoded(picture.convert("CMYK"), "jpeg", quality=98))
  assert found.mode == "RGB"
  assert np.abs(np.asarray(found).astype(int) - np.asarray(picture)).mean() < 3


def test_pixels_that_are_no_picture_are_refused_by_their_mode():
  with pytest.raises(BadImage, match="mode F"):
    opened(np.zeros((4, 4), np.float32))


@config
class Mixed(Source):
  """Pictures in many encodings and sizes."""

  def n_classes(self):
    return 2

  def shape(self):
    return None

  def open(self):
    raws = np.empty(12, object)
    for i in range(12):
      picture = smooth(40 + i, 60 - i, 3 if i % 2 else 1)
      raws[i] = encoded(picture[..., 0] if i % 2 == 0 else picture, ("png", "jpeg", "webp")[i % 3])
    return Opened(ArraySplit(raws, np.arange(12) % 2, "mixed"), 0.2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [(), (RandomResizedCrop(), HorizontalFlip())])
def test_encoded_images_of_any_size_become_one_batch_whatever_the_threads(channels, augment):
  data = ImageData(source=Mixed(), size=16, channels=channels, augment=augment).make(0)
  whole = data.batch(0, 30)["inputs"]
  assert whole.shape == (30, 16, 16, channels) and whole.std() > 0.1
  parts = [data.batch(0, 30, slice(i, i + 1))["inputs"] for i in range(30)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_an_example_looks_different_in_every_epoch_and_with_every_seed():
  crop = (RandomResizedCrop(area=(0.2, 0.9)),)
  flat = lambda seed, at: (
    ImageData(source=Digits(), size=8, channels=1, augment=crop).make(seed).batch(at, 1_468)
  )
  first, second, other = flat(0, 0), flat(0, 1_468), flat(1, 0)
  looks = lambda b: {x.tobytes() for x in b["inputs"]}
  assert len(looks(first)) > 1_400
  assert len(looks(first) & looks(second)) < 60 and len(looks(first) & looks(other)) < 60
  evaluated = lambda seed: ImageData(source=Digits(), size=8, augment=crop).make(seed)
  np.testing.assert_array_equal(
    evaluated(0).eval_batch(0, 9)["inputs"], evaluated(1).eval_batch(0, 9)["inputs"]
  )


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"size": 0}, "at least 1 pixel"),
    ({"channels": 2}, "grey .1. or have colours .3."),
    ({"crop": 1.5}, "above 0 and at most 1"),
    ({"mean": (0.1, 0.2)}, "mean has 2 numbers"),
    ({"std": (0.0,)}, "above 0"),
    ({"augment": (HorizontalFlip(), RandomResizedCrop())}, "comes first"),
    ({"augment": (HorizontalFlip(probability=2.0),)}, "from 0 to 1"),
    ({"augment": (RandomResizedCrop(area=(0.5, 0.1)),)}, "smaller one first"),
    ({"source": Synthetic()}, "use FeatureData"),
  ],
)
def test_impossible_settings_are_refused(fields, said):
  data = ImageData(**{"source": FashionMNISTSubset(), "size": 28} | fields)
  with pytest.raises(Refused, match=said):
    validate(toys.experiment(data=data))


def test_as_many_pixels_in_another_shape_are_cropped_like_any_other():
  @config
  class Wide(Source):
    def n_classes(self):
      return 1

    def shape(self):
      return 4, 16

    def open(self):
      pixels = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (3, 4, 1))
      return Opened(ArraySplit(pixels, np.zeros(3, int), "wide"), 0.0)

  x = ImageData(source=Wide(), size=8, channels=1, mean=(0.0,), std=(1.0,)).make(0).batch(0, 1)
  assert x["inputs"].min() * 255 > 50 and x["inputs"].max() * 255 < 100  # Its middle.


def test_numbers_that_are_no_bytes_are_no_pixels():
  @config
  class Floats(Source):
    def n_classes(self):
      return 1

    def shape(self):
      return 4, 4

    def open(self):
      return Opened(ArraySplit(np.zeros((2, 4, 4)), np.zeros(2, int), "floats"), 0.0)

  with pytest.raises(Refused, match="pixels of float64, not uint8"):
    ImageData(source=Floats(), size=4).make(0).examples()


def test_the_code_of_the_page_about_images_runs():
  page = pathlib.Path(__file__).parent.parent.parent / "docs" / "images.md"
  first, second = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
  names: dict = {}
  exec(first, names)
  assert names["batch"]["inputs"].shape == (32, 28, 28, 1)
  # The mean and deviation that it gives are those of the images.
  plain = ImageData(source=names["images"].source, size=28, channels=1, mean=(0.286,), std=(0.353,))
  inputs = plain.make(0).batch(0, 4500)["inputs"]
  assert abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02
  validate(toys.experiment(data=names["features"]))
  exec(second, names)
  with pytest.raises(Refused, match="data/flowers/train is not there"):
    validate(toys.experiment(data=names["photographs"]))
