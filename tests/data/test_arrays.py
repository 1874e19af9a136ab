import gzip
import lzma

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.arrays import IDX, Arrays, read_idx
from bigtrain.data.features import FeatureData
from bigtrain.data.vision import ImageData
from bigtrain.validate import validate
from tests import toys

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 5, 7), dtype=np.uint8)
LABELS = np.uint8(np.arange(30) % 3)


def idx(array, code=8):
  """An IDX file by the letter of its description."""
  header = bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
  return header + array.tobytes()


@pytest.fixture
def files(tmp_path):
  """IDX files of three kinds of compression, and the source of them."""
  (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES[:20])))
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:20]))
  (tmp_path / "t10k-images-idx3-ubyte.xz").write_bytes(lzma.compress(idx(IMAGES[20:])))
  (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[20:]))
  train, held_out = str(tmp_path / "train"), str(tmp_path / "t10k")
  return IDX(train=train, validation=held_out, size=(5, 7), classes=3)


def refusal(source):
  with pytest.raises(Refused) as caught:
    FeatureData(source=source).make(0).examples()
  return str(caught.value)


def test_idx_files_are_read_as_they_are_or_compressed(files):
  data = FeatureData(source=files, standardize=False).make(0)
  batch = data.eval_batch(0, 10)
  np.testing.assert_array_equal(batch["inputs"], IMAGES[20:].reshape(10, 35))
  np.testing.assert_array_equal(batch["labels"], LABELS[20:])
  assert data.examples() == 20
  assert ImageData(source=files, size=6, channels=1).make(0).batch(0, 4)["inputs"].shape == (
    4, 6, 6, 1,
  )  # fmt: skip


def test_idx_files_of_other_numbers_are_big_endian(tmp_path):
  numbers = np.array([[1, -2, 300], [4, 5, 6]])
  for code, dtype in ((11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")):
    (tmp_path / "x").write_bytes(idx(numbers.astype(dtype), code))
    np.testing.assert_array_equal(read_idx(tmp_path / "x"), numbers)


def test_damaged_idx_files_are_refused_by_name(files, tmp_path):
  path = tmp_path / "train-images-idx3-ubyte.gz"
  whole = path.read_bytes()
  path.write_bytes(whole[:-20])
  assert f"{path} cannot be read" in refusal(files)
  path.write_bytes(gzip.compress(idx(IMAGES[:20])[:-1]))
  assert "which is not what its header says" in refusal(files)
  path.write_bytes(gzip.compress(b"text"))
  assert f"{path} is no IDX file" in refusal(files)
  path.write_bytes(gzip.compress(idx(IMAGES[:19])))
  assert "19 examples but labels of shape (20,)" in refusal(files)
  path.unlink()
  with pytest.raises(Refused, match=r"train-images-idx3-ubyte is not there"):
    validate(toys.experiment(data=ImageData(source=files, size=5)))


def test_images_of_another_size_than_stated_are_refused(files):
  files.size = (7, 5)
  assert refusal(files).endswith("has examples of shape (5, 7), not (7, 5) as `size` says")


def test_numpy_files_come_from_an_archive_or_a_folder(tmp_path):
  np.savez(tmp_path / "a.npz", x=IMAGES, y=LABELS)
  np.save(tmp_path / "x.npy", IMAGES)
  np.save(tmp_path / "y.npy", LABELS)
  settings = {"size": (5, 7), "classes": 3, "inputs": "x", "labels": "y"}
  archive = Arrays(train=str(tmp_path / "a.npz"), **settings)
  folder = Arrays(train=str(tmp_path), **settings)
  one, other = (ImageData(source=s, size=5, channels=1).make(0) for s in (archive, folder))
  np.testing.assert_array_equal(one.batch(0, 40)["inputs"], other.batch(0, 40)["inputs"])
  assert one.digest() == other.digest()
  archive.labels = "yy"
  assert "has no array 'yy'; did you mean 'y'?" in refusal(archive)


@pytest.mark.parametrize(
  ("inputs", "labels", "said"),
  [
    (IMAGES, LABELS.astype(float), "labels of float64; they are integers"),
    (IMAGES, LABELS[:, None], "labels of shape (30, 1)"),
    (IMAGES.astype("U3"), LABELS, "they are real numbers"),
    (IMAGES.astype(object), LABELS, "cannot be read"),  # No pickles: these run code.
  ],
)
def test_arrays_of_other_kinds_are_refused(inputs, labels, said, tmp_path):
  np.savez(tmp_path / "a.npz", inputs=inputs, labels=labels)
  assert said in refusal(Arrays(train=str(tmp_path / "a.npz"), size=(5, 7), classes=3))


def test_a_file_that_is_no_archive_or_not_there_is_refused(tmp_path):
  (tmp_path / "a.npz").write_text("text")
  source = Arrays(train=str(tmp_path / "a.npz"), size=(5, 7), classes=3)
  assert "a.npz: the array 'inputs' cannot be read" in refusal(source)
  source.train = str(tmp_path / "b.npz")
  with pytest.raises(Refused, match=r"b.npz is not there.*'a.npz'"):
    validate(toys.experiment(data=FeatureData(source=source)))


def test_held_out_examples_that_are_the_training_file_are_refused(files):
  for source in (Arrays(train="x.npz", validation="./x.npz", size=(1,), classes=2), files):
    if source is files:
      source.validation = source.train
    with pytest.raises(Refused, match="must not be trained on"):
      validate(toys.experiment(data=FeatureData(source=source)))


def test_an_array_whose_head_is_no_python_is_refused(tmp_path):
  np.save(tmp_path / "inputs.npy", np.zeros((4, 2), np.float32))
  np.save(tmp_path / "labels.npy", np.zeros(4, np.int64))
  data = bytearray((tmp_path / "inputs.npy").read_bytes())
  data[10:90] = b"(" * 80
  (tmp_path / "inputs.npy").write_bytes(data)
  with pytest.raises(Refused, match=r"the array 'inputs' cannot be read"):
    Arrays(train=str(tmp_path), size=(2,), classes=3).open()
