import copy
import hashlib
import itertools

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.arrays import Arrays
from bigtrain.data.augment import (
  HorizontalFlip,
  PadCrop,
  RandAugment,
  RandomErasing,
  RandomResizedCrop,
)
from bigtrain.data.datasets import Digits, FashionMNISTSubset, Synthetic
from bigtrain.data.examples import Opened, Source
from bigtrain.data.features import FeatureData
from bigtrain.data.labelled_text import LabelledText
from bigtrain.data.text_classes import Novels
from bigtrain.data.tokenizers import BPE
from bigtrain.data.vision import ImageData
from bigtrain.validate import validate
from tests import toys
from tests.fields import batch_bytes, changed, leaves, second_values

AUGMENT = (RandomResizedCrop(), HorizontalFlip(), PadCrop(), RandAugment(), RandomErasing())
IMAGES = ImageData(source=FashionMNISTSubset(), size=28, channels=1, augment=AUGMENT)
FEATURES = FeatureData(source=Synthetic(examples=60, held_out=13, features=5, classes=3))

TEXT = LabelledText(
  source=Novels(words=600), tokenizer=BPE(vocab=300, special=("[CLS]", "[SEP]")), seq=24
)


@pytest.fixture
def saved(tmp_path):
  """Saves arrays as a .npz and returns the source of them."""

  def save(inputs, labels, name="train", **fields):
    path = tmp_path / f"{name}.npz"
    np.savez(path, inputs=inputs, labels=labels)
    defaults = {"size": inputs.shape[1:], "classes": int(labels.max()) + 1}
    return Arrays(train=str(path), **defaults | fields)

  return save


def numbers(n, seed=0, classes=3):
  """Features that are all different, and labels in turn."""
  return np.random.default_rng(seed).normal(size=(n, 4)), np.arange(n) % classes


@pytest.mark.parametrize("config", [IMAGES, FEATURES, TEXT])
def test_a_batch_is_the_same_whatever_the_slices_it_is_read_in(config):
  data, again = config.make(3), config.make(3)
  whole = data.batch(50, 24)
  for cuts in ([0, 24], [0, 5, 6, 24], list(range(25))):
    parts = [again.batch(50, 24, slice(*cut)) for cut in itertools.pairwise(cuts)]
    for name, values in whole.items():
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
  # Another size of batch changes no example: only the position counts.
  for name, values in data.batch(57, 3).items():
    np.testing.assert_array_equal(values, whole[name][7:10])


@pytest.mark.parametrize("config", [IMAGES, FEATURES, TEXT])
def test_a_batch_has_the_shapes_that_spec_promises_without_data(config):
  spec = config.make(0).spec(6)
  for batch in (config.make(0).batch(0, 6), config.make(0).eval_batch(0, 6)):
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
      k: (v.shape, v.dtype) for k, v in spec.items()
    }


def test_every_epoch_has_every_example_once_in_an_order_of_its_own(saved):
  inputs, labels = numbers(50)
  data = FeatureData(source=saved(inputs, labels, validation=0.2), standardize=False).make(1)
  n = data.examples()
  epochs = [data.batch(n * i, n) for i in range(3)]
  rows = [[tuple(x) for x in epoch["inputs"].tolist()] for epoch in epochs]
  assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])
  assert len(set(rows[0])) == n and rows[0] != rows[1] != rows[2]
  assert rows[0] != [
    tuple(x)
    for x in FeatureData(source=data._source, standardize=False)
    .make(2)
    .batch(0, n)["inputs"]
    .tolist()
  ]
  # A batch over the edge of an epoch goes on with the next.
  crossing = data.batch(n - 2, 4)["inputs"]
  wanted = np.concatenate([epochs[0]["inputs"][-2:], epochs[1]["inputs"][:2]])
  np.testing.assert_array_equal(crossing, wanted)


def test_labels_stay_with_their_inputs(saved):
  inputs, labels = numbers(40)
  data = FeatureData(source=saved(inputs, labels, validation=0.25), standardize=False).make(0)
  label_of = {tuple(x): y for x, y in zip(inputs.astype(np.float32).tolist(), labels, strict=True)}
  for batch in (data.batch(0, 64), data.eval_batch(0, data.eval_examples())):
    assert [label_of[tuple(x)] for x in batch["inputs"].tolist()] == batch["labels"].tolist()
    assert batch["weights"].tolist() == [1.0] * len(batch["labels"])


def test_evaluation_has_every_held_out_example_once_then_padding():
  data = FEATURES.make(0)
  batches = [data.eval_batch(i, 8) for i in (0, 8)]
  weights = np.concatenate([b["weights"] for b in batches])
  assert data.eval_examples() == 13 and weights.tolist() == [1.0] * 13 + [0.0] * 3
  inputs = np.concatenate([b["inputs"] for b in batches])
  assert len(np.unique(inputs[:13], axis=0)) == 13 and not inputs[13:].any()
  np.testing.assert_array_equal(data.eval_batch(16, 4)["weights"], np.zeros(4))


def test_a_share_is_held_out_by_content_so_that_equal_examples_are_on_one_side(saved):
  inputs, labels = numbers(200, classes=2)
  inputs, labels = np.tile(inputs, (2, 1)), np.tile(labels, 2)
  data = FeatureData(source=saved(inputs, labels, validation=0.3), standardize=False).make(0)
  train = {tuple(x) for x in data.batch(0, data.examples())["inputs"].tolist()}
  held_out = [tuple(x) for x in data.eval_batch(0, data.eval_examples())["inputs"].tolist()]
  assert not train & set(held_out)
  assert data.examples() + len(held_out) == 400 and 60 < len(held_out) < 180
  # The rule, by itself: the first 64 bits of a hash against the share.
  low = [
    int.from_bytes(hashlib.blake2b(x.tobytes(), digest_size=8).digest(), "little")
    for x in inputs.astype(np.float32)
  ]
  assert len(held_out) == sum(x < 0.3 * 2**64 for x in low)


def test_a_training_example_that_is_also_held_out_is_kept_out_and_reported(saved):
  inputs, labels = numbers(30)
  saved(inputs[:4], labels[:4], "other")
  source = saved(inputs, labels)
  source.validation = source.train.replace("train.npz", "other.npz")
  data = FeatureData(source=source, standardize=False).make(0)
  assert (data.examples(), data.eval_examples()) == (26, 4)
  assert "4 are also held out" in str(data.kept_out()) and "train.npz[0]" in str(data.kept_out())
  source.on_error = "refuse"
  with pytest.raises(Refused, match=r"4 are also held out.*on_error"):
    FeatureData(source=source).make(0).examples()


def test_numbers_that_are_none_and_labels_out_of_range_are_kept_out_and_counted(saved):
  inputs, labels = numbers(30)
  inputs[3, 1], inputs[7, 0] = np.nan, np.inf
  labels[5], labels[6] = 3, -1
  data = FeatureData(source=saved(inputs, labels, classes=3, validation=0)).make(0)
  assert data.examples() == 26 and np.isfinite(data.batch(0, 26)["inputs"]).all()
  found = str(data.kept_out())
  assert "2 have a feature that is NaN or infinite" in found
  assert "2 have a label outside 0 to 2" in found and "train.npz[3]" in found
  assert set(data.batch(0, 26)["labels"]) == {0, 1, 2}


def test_a_class_without_examples_is_refused(saved):
  inputs, labels = numbers(30)
  with pytest.raises(Refused, match=r"no training example of class 3, 4.*count from 0"):
    FeatureData(source=saved(inputs, labels, classes=5)).make(0).examples()
  # Labels that count from 1: the last class is out of range, the first one empty.
  with pytest.raises(Refused, match="no training example of class 0"):
    FeatureData(source=saved(inputs, labels + 1, classes=3)).make(0).examples()


def test_training_examples_that_are_all_held_out_too_are_refused_as_such(saved):
  inputs, labels = numbers(30)
  held_out = saved(inputs, labels, "held_out").train
  with pytest.raises(Refused, match=r"has no example to train on; kept out.*30 are also held out"):
    FeatureData(source=saved(inputs, labels, validation=held_out)).make(0).examples()


def test_features_are_standardized_by_the_training_examples_alone(saved):
  inputs, labels = numbers(50)
  inputs = inputs * [1, 10, 0.1, 0] + [5, 0, 1, 7]  # The last one never changes.
  data = FeatureData(source=saved(inputs, labels, validation=0.3)).make(0)
  raw = FeatureData(source=data._source, standardize=False).make(0)
  train = raw.batch(0, raw.examples())["inputs"].astype(np.float64)
  scale = np.where(train.std(0) > 1e-6, train.std(0), 1)
  for n, ours, theirs in (
    (data.examples(), data.batch, raw.batch),
    (data.eval_examples(), data.eval_batch, raw.eval_batch),
  ):
    wanted = (theirs(0, n)["inputs"] - train.mean(0)) / scale
    np.testing.assert_allclose(ours(0, n)["inputs"], wanted, atol=1e-4)


def test_the_digest_follows_contents_and_not_places(saved, tmp_path):
  inputs, labels = numbers(30)
  digest = lambda source: FeatureData(source=source).make(0).digest()
  first = digest(saved(inputs, labels))
  assert digest(saved(inputs, labels, "elsewhere")) == first
  other = inputs.copy()
  other[3, 2] += 1
  assert digest(saved(other, labels)) != first
  assert digest(saved(inputs, (labels + 1) % 3)) != first
  assert digest(saved(inputs, labels, validation=0.5)) != first


def test_every_field_changes_the_batches():
  look = lambda e: [batch_bytes(b) for b in _batches(e.data.make(e.seed))]
  values = {"PadCrop.pixels": (9,), "RandAugment.operations": (3,)}
  dead = []
  for data in (IMAGES, FEATURES):
    e = toys.experiment(data=data)
    for leaf in leaves(e):
      if leaf.path.startswith("data."):
        node = e
        for name in leaf.path.split("."):
          node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
        seconds = values.get(leaf.field) or second_values(node, leaf.kind)
        others = [changed(e, leaf.path, v) for v in seconds]
        valid = [other for other in others if _valid(other.data)]
        if not any(look(other) != look(copy.deepcopy(e)) for other in valid[:2]):
          dead.append(leaf.path)
  assert not dead


def _batches(data):
  return [data.batch(0, 16), data.batch(500, 16), data.eval_batch(0, 16)]


def _valid(data):
  try:
    validate(toys.experiment(data=data))
  except Refused:
    return False
  return True


def test_a_source_of_ones_own_needs_no_more_than_two_arrays():
  from bigtrain.config import config
  from bigtrain.data.arrays import ArraySplit

  @config
  class Parity(Source):
    def n_classes(self):
      return 2

    def shape(self):
      return (2,)

    def open(self):
      x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
      return Opened(ArraySplit(x, np.array([0, 1, 1, 0]), "parity"), 0.0)

  data = FeatureData(source=Parity(), standardize=False).make(0)
  batch = data.batch(0, 40)
  assert (batch["inputs"].sum(1) % 2 == batch["labels"]).all() and data.eval_examples() == 0


def test_what_people_are_told_names_the_set_and_its_size():
  told = ImageData(source=FashionMNISTSubset(), size=28).make(0).about()
  assert told == ("a subset of Fashion-MNIST: 4,500 examples of 10 classes, 1,000 held out")
  assert "digits of UCI: " in FeatureData(source=Digits()).make(0).about()


def test_what_is_held_out_in_float32_is_not_trained_on_in_float64(saved):
  inputs, labels = numbers(30)
  held_out = saved(inputs[:4].astype(np.float32), labels[:4], "held_out").train
  data = FeatureData(source=saved(inputs, labels, validation=held_out)).make(0)
  assert data.examples() == 26 and "4 are also held out" in str(data.kept_out())


def test_finite_numbers_that_float32_does_not_hold_are_kept_out_and_large_means_lose_nothing(saved):
  inputs, labels = numbers(300)
  inputs[:, 3] = 0.1  # Never changes; its mean is rounded.
  inputs[7, 1] = 1e39
  data = FeatureData(source=saved(inputs + np.array([0, 0, 1e9, 0]), labels, validation=0.2)).make(
    0
  )
  assert "1 has a feature too large for float32" in str(data.kept_out())
  batch = data.batch(0, data.examples())["inputs"]
  np.testing.assert_allclose(batch.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(batch.std(0), [1, 1, 1, 0], atol=1e-5)


def test_examples_of_which_none_is_held_out_are_refused_unless_that_is_wanted(saved):
  inputs, labels = numbers(6)
  with pytest.raises(Refused, match=r"holds out none of its examples, 6 of which.*or to 0"):
    FeatureData(source=saved(inputs, labels, validation=1e-9)).make(0).examples()
  assert FeatureData(source=saved(inputs, labels, validation=0)).make(0).eval_examples() == 0
