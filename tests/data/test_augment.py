"""Augmentations against closed forms, and RandAugment's operations against numpy."""

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.augment import (
  OPERATION,
  HorizontalFlip,
  PadCrop,
  RandAugment,
  RandomErasing,
  RandomResizedCrop,
  rectangle,
)
from bigtrain.data.draws import Draws
from bigtrain.data.shuffle import hashes

R = np.random.default_rng(0)
COLOURS = R.integers(0, 256, (20, 30, 3), dtype=np.uint8)
SQUARE = R.integers(0, 256, (16, 16, 3), dtype=np.uint8)


def applied(operation, pixels, magnitude, sign=1):
  return np.asarray(OPERATION[operation](Image.fromarray(pixels), magnitude, sign))


def test_draws_are_the_hashes_of_the_shuffle():
  draws = Draws(12345)
  wanted = hashes(np.uint64(12345), np.arange(5)).tolist()
  assert [draws.bits() for _ in range(5)] == wanted


def test_draws_are_uniform_and_forks_are_independent():
  draws = [Draws(key) for key in range(4000)]
  first = np.array([[d.fork(0).uniform(), d.fork(1).uniform(), d.uniform()] for d in draws])
  assert np.abs(first.mean(0) - 0.5).max() < 0.02 and np.abs(first.var(0) - 1 / 12).max() < 0.005
  assert np.abs(np.corrcoef(first.T) - np.eye(3)).max() < 0.05
  assert np.bincount([Draws(k).below(5) for k in range(5000)]).min() > 900


def test_a_flip_exchanges_left_and_right_as_often_as_it_says():
  image = Image.fromarray(SQUARE)
  outs = [np.asarray(HorizontalFlip(probability=0.3)(image, Draws(k))) for k in range(1000)]
  flipped = [np.array_equal(out, SQUARE[:, ::-1]) for out in outs]
  assert all(f or np.array_equal(out, SQUARE) for f, out in zip(flipped, outs, strict=True))
  assert 0.25 < np.mean(flipped) < 0.35


def test_pad_and_crop_is_a_window_of_the_padded_image_and_every_place_occurs():
  padded = np.pad(SQUARE, ((2, 2), (2, 2), (0, 0)))
  windows = {padded[i : i + 16, j : j + 16].tobytes() for i in range(5) for j in range(5)}
  change = PadCrop(pixels=2)
  found = {np.asarray(change(Image.fromarray(SQUARE), Draws(k))).tobytes() for k in range(400)}
  assert found == windows


def test_random_rectangles_have_the_areas_and_ratios_that_are_allowed():
  found = [rectangle(Draws(k), 200, 300, (0.1, 0.3), (0.5, 2.0)) for k in range(2000)]
  left, top, w, h = np.array(found).T
  area, ratio = w * h / 60_000, w / h
  assert area.min() > 0.098 and area.max() < 0.302 and ratio.min() > 0.49 and ratio.max() < 2.02
  assert abs(area.mean() - 0.2) < 0.01 and abs(np.log(ratio).mean()) < 0.03
  assert left.min() == 0 == top.min() and (left + w).max() == 200 and (top + h).max() == 300
  assert rectangle(Draws(0), 10, 1000, (1.0, 1.0), (1.0, 1.0)) is None


def test_a_resized_crop_of_a_ramp_is_a_ramp_of_what_it_took():
  ramp = Image.fromarray(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (100, 1)))
  for key in range(20):
    change = RandomResizedCrop(area=(0.2, 0.6), ratio=(0.9, 1.1))
    left, _, w, _ = rectangle(Draws(key), 100, 100, change.area, change.ratio)
    out = np.asarray(change.cropped(ramp, Draws(key), 10)).astype(float)
    centres = 2 * (left + w * (np.arange(10) + 0.5) / 10 - 0.5)
    np.testing.assert_allclose(out[:, 1:-1], np.tile(centres, (10, 1))[:, 1:-1], atol=1.5)


def test_a_crop_for_which_there_is_no_place_is_the_centre():
  narrow = Image.fromarray(np.uint8(np.arange(200)[:, None] * np.ones((1, 4))))
  out = np.asarray(RandomResizedCrop(area=(1.0, 1.0)).cropped(narrow, Draws(3), 4))
  assert out.shape == (4, 4) and abs(out.mean() - 99.5) < 2  # The middle: 5 rows around 99.5.
  assert np.ptp(out[:, 0].astype(int)) < 6


def test_erasing_replaces_one_rectangle_by_noise_and_nothing_else():
  change, areas = RandomErasing(probability=1.0, area=(0.1, 0.2), ratio=(0.5, 2.0)), []
  image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
  for key in range(50):
    changed = np.asarray(change(image, Draws(key))).any(-1)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    inside = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert inside.mean() > 0.99 and inside.sum() == changed.sum()
    areas.append(inside.size / 1600)
  assert min(areas) > 0.09 and max(areas) < 0.21
  never = RandomErasing(probability=0.0)
  assert not any(np.asarray(never(image, Draws(key))).any() for key in range(20))


def test_operations_on_values_agree_with_their_formulas():
  x = COLOURS.astype(float)
  np.testing.assert_array_equal(applied("identity", COLOURS, 0.7), COLOURS)
  wanted = np.where(x < 256 * 0.3, x, 255 - x)
  wanted[COLOURS == 77] = applied("solarize", COLOURS, 0.7)[COLOURS == 77]  # 76.8, rounded.
  np.testing.assert_array_equal(applied("solarize", COLOURS, 0.7), wanted)
  np.testing.assert_array_equal(applied("posterize", COLOURS, 0.75), COLOURS & 0b11111000)
  grey = np.round(x @ [0.299, 0.587, 0.114])
  for name, towards in (
    ("brightness", np.zeros_like(x)),
    ("contrast", np.full_like(x, np.floor(grey.mean() + 0.5))),
    ("color", np.repeat(grey[..., None], 3, -1)),
  ):
    for sign in (1, -1):
      factor = 1 + sign * 0.9 * 0.5
      out = np.clip(towards + factor * (x - towards), 0, 255)
      assert np.abs(applied(name, COLOURS, 0.5, sign) - out).max() <= 2, (name, sign)


def test_operations_on_histograms_stretch_and_flatten_them():
  narrow = np.uint8(100 + COLOURS % 50)
  x = narrow.astype(float)
  low, high = x.min((0, 1)), x.max((0, 1))
  stretched = applied("auto_contrast", narrow, 0.5)
  assert np.abs(stretched - (x - low) / (high - low) * 255).max() <= 1
  many = np.tile(narrow, (10, 10, 1))
  levels = np.sort(applied("equalize", many, 0.5)[..., 0].ravel())
  assert np.abs(levels - np.linspace(0, 255, levels.size)).max() < 20


def test_operations_on_places_move_them_as_far_as_they_say():
  x = np.zeros((33, 33), np.uint8)
  x[16, 24] = 255
  peak = lambda out: np.unravel_index(out.argmax(), out.shape)
  shift = round(150 / 331 * 33 * 0.5)
  assert abs(peak(applied("translate_x", x, 0.5))[1] - (24 - shift)) <= 1
  assert abs(peak(applied("translate_y", x, 0.5, -1))[0] - (16 + shift)) <= 1
  assert abs(peak(applied("shear_x", x, 1.0))[1] - (24 - 0.3 * 16)) <= 1
  assert abs(peak(applied("shear_y", x, 1.0))[0] - (16 - 0.3 * 24)) <= 1
  angle = np.deg2rad(30)  # Counterclockwise, y pointing down.
  wanted = 16 - 8 * np.sin(angle), 16 + 8 * np.cos(angle)
  assert np.abs(np.subtract(peak(applied("rotate", x, 1.0)), wanted)).max() <= 1
  blurred = applied("sharpness", x, 1.0, -1)
  assert blurred[15, 24] > 0 and blurred[16, 24] < 255


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_operation_keeps_size_and_mode(mode):
  image = Image.fromarray(COLOURS).convert(mode)
  for name, operation in OPERATION.items():
    for magnitude in (0.0, 0.5, 1.0):
      for sign in (1, -1):
        out = operation(image, magnitude, sign)
        assert (out.size, out.mode) == (image.size, image.mode), name


def test_rand_augment_applies_so_many_operations_and_each_occurs():
  image, counts = Image.fromarray(SQUARE), {}
  for key in range(600):
    out = np.asarray(RandAugment(operations=1, magnitude=7.0)(image, Draws(key)))
    match = [
      name
      for name in OPERATION
      if any(np.array_equal(out, applied(name, SQUARE, 0.7, sign)) for sign in (1, -1))
    ]
    assert match
    counts[match[0]] = counts.get(match[0], 0) + 1
  # auto_contrast leaves an image alone that has all values, as identity does.
  assert len(counts) >= len(OPERATION) - 1
  draws = Draws(5)
  first = RandAugment(operations=1)(image, draws)
  twice = RandAugment(operations=1)(first, draws)
  np.testing.assert_array_equal(RandAugment(operations=2)(image, Draws(5)), twice)
