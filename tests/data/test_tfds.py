import io
import os
import pathlib
import re
import sys

import numpy as np
import pytest
from PIL import Image

from bigtrain.config import Refused
from bigtrain.data.features import FeatureData
from bigtrain.data.tfds import TFDS, TFDSSplit
from bigtrain.data.vision import ImageData
from bigtrain.validate import validate
from tests import toys

tfds = pytest.importorskip("tensorflow_datasets")


class Stripes(tfds.core.GeneratorBasedBuilder):
  """Pictures whose brightness is their class, as array_record; one of them is damaged."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
          "vector": tfds.features.Tensor(shape=(4,), dtype=np.float32),
          "label": tfds.features.ClassLabel(num_classes=3),
          "other": tfds.features.ClassLabel(num_classes=3),
        }
      ),
    )

  def _split_generators(self, manager):
    return {"train": self._generate_examples(30, 0), "test": self._generate_examples(9, 1)}

  def _generate_examples(self, n, part):
    for i in range(n):
      file = io.BytesIO()
      Image.fromarray(np.full((10 + i, 20, 3), 100 * (i % 3) + part, np.uint8)).save(file, "png")
      data = file.getvalue()[:50] if (i, part) == (4, 0) else file.getvalue()
      vector = np.full(4, i + 100 * part, np.float32)
      yield i, {"image": data, "vector": vector, "label": i % 3, "other": (i + 1) % 3}


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("BIGTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    Stripes(data_dir=folder, file_format="array_record").download_and_prepare()
    yield str(folder)


def source(folder, **fields):
  return TFDS(**{"name": "stripes", "classes": 3, "data_dir": folder} | fields)


def test_a_prepared_dataset_is_read_by_name_at_random_without_tensorflow(prepared):
  data = ImageData(source=source(prepared), size=8).make(0)
  assert (data.examples(), data.eval_examples()) == (29, 9)
  for part, batch in enumerate((data.batch(3, 40), data.eval_batch(0, 9))):
    wanted = (100 * batch["labels"] + part) / 255 * 2 - 1
    np.testing.assert_allclose(batch["inputs"][:, 4, 4, 1], wanted, atol=1e-6)
  # Builders store examples in an order of their own.
  assert re.fullmatch(
    r"kept out of the data: 1 is damaged; first stripes train\[\d+\] is damaged",
    str(data.kept_out()),
  )
  assert "tensorflow" not in sys.modules


def test_slices_of_splits_and_shares_can_be_held_out(prepared):
  sliced = source(prepared, train="train[:20]", validation="train[20:]")
  data = ImageData(source=sliced, size=8).make(0)
  assert (data.examples(), data.eval_examples()) == (19, 10)
  share = ImageData(source=source(prepared, validation=0.3), size=8).make(0)
  assert share.examples() + share.eval_examples() == 29 and share.eval_examples() > 2


def test_vectors_of_numbers_are_features(prepared):
  settings = source(prepared, input="vector", size=(4,))
  data = FeatureData(source=settings, standardize=False).make(0)
  batch = data.eval_batch(0, 9)
  assert sorted(batch["inputs"][:, 0]) == list(range(100, 109))
  np.testing.assert_array_equal(batch["inputs"][:, 3] % 100 % 3, batch["labels"])


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"classes": 4}, "stripes has 3 classes, but `classes` is 4"),
    ({"name": "stipes"}, "tfds cannot find stipes: .*not found"),
    ({"train": "trian"}, "tfds cannot open stripes trian: Unknown split 'trian'"),
    ({"input": "picture"}, "no feature 'picture'; there is image, vector, label"),
    ({"validation": "train"}, "which is trained on"),
    ({"validation": 1.0}, "at least 0 and below 1"),
  ],
)
def test_wrong_names_are_refused(prepared, fields, said):
  data = ImageData(source=source(prepared, **fields), size=8)
  with pytest.raises(Refused, match=said):
    validate(toys.experiment(data=data))
    data.make(0).examples()


def test_another_label_or_a_dataset_built_anew_is_looked_at_anew(prepared):
  classes = lambda label: dict(source=source(prepared, label=label, classes=3), size=8)
  labels = lambda label: ImageData(**classes(label)).make(0).eval_batch(0, 9)["labels"]
  digest = lambda label: ImageData(**classes(label)).make(0).digest()
  np.testing.assert_array_equal(labels("other"), (labels("label") + 1) % 3)
  assert digest("other") != digest("label")
  key = TFDSSplit(source(prepared), "train").key
  assert TFDSSplit(source(prepared), "train").key == key
  for shard in pathlib.Path(prepared).rglob("*train*.array_record*"):
    os.utime(shard, (10**9, 10**9))
  assert TFDSSplit(source(prepared), "train").key != key
