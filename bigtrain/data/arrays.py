"""Arrays of labelled examples in files: numpy's .npz and .npy, and IDX, the format of MNIST.

Dims: N examples.
"""

import gzip
import lzma
import math
import pathlib
import zlib

import numpy as np

from bigtrain.config import Refused, config, nearest
from bigtrain.data.examples import OnError, Opened, OwnFiles, Split
from bigtrain.data.sources import missing

IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
IDX_SUFFIXES = {"": open, ".gz": gzip.open, ".xz": lzma.open}


class ArraySplit(Split):
  """Examples in an array whose first dim counts them."""

  def __init__(self, inputs: np.ndarray, labels: np.ndarray, name: str):
    self._inputs, self._labels, self._name = inputs, labels, name

  def __len__(self) -> int:
    return len(self._labels)

  def read(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return self._inputs[at], self._labels[at]

  def where(self, i: int) -> str:
    return f"{self._name}[{i}]"


@config
class Arrays(OwnFiles):
  """Arrays in a .npz file, or in a folder of .npy files: examples (N, *shape), labels (N,).

  Images are uint8, (height, width) or (height, width, channels); features any numbers.
  """

  train: str  # The .npz file, or the folder of .npy files.
  size: tuple[int, ...]  # Of one example, such as (100,) or (32, 32, 3).
  classes: int  # Labels are integers from 0 to below this.
  validation: float | str = 0.1  # Held out: a share by a hash of the bytes, or another file.
  inputs: str = "inputs"  # The name of the array of examples.
  labels: str = "labels"  # The name of the array of labels.
  on_error: OnError = "skip"

  def check(self) -> None:
    check_sides(self.train, self.validation)
    for path in (self.train, self.validation):
      if isinstance(path, str) and not pathlib.Path(path).expanduser().exists():
        raise missing(path)

  def open(self) -> Opened:
    held_out = self.validation
    return Opened(
      self._split(self.train), self._split(held_out) if isinstance(held_out, str) else held_out
    )

  def _split(self, name: str) -> ArraySplit:
    inputs, labels = (self._array(pathlib.Path(name).expanduser(), n) for n in self._names())
    return checked(inputs, labels, self.size, name)

  def _names(self) -> tuple[str, str]:
    return self.inputs, self.labels

  def _array(self, path: pathlib.Path, name: str) -> np.ndarray:
    try:
      if path.is_dir():
        return np.load(path / f"{name}.npy", mmap_mode="r")
      with np.load(path) as file:
        if name not in file.files:
          raise Refused(f"{path} has no array {name!r}{nearest(name, file.files)}")
        return file[name]
    except Refused:
      raise
    except Exception as error:  # numpy parses what is in a file by many means.
      raise Refused(f"{path}: the array {name!r} cannot be read: {error}") from error


@config
class IDX(OwnFiles):
  """IDX files, as MNIST's, also .gz and .xz: PREFIX-images-idx3-ubyte, PREFIX-labels-idx1-ubyte."""

  train: str  # The prefix with its folder, such as data/mnist/train.
  size: tuple[int, ...] = (28, 28)  # Height and width of the images.
  classes: int = 10  # Labels are from 0 to below this.
  validation: float | str = 0.1  # Held out: a share by a hash of the bytes, or another prefix.
  on_error: OnError = "skip"

  def check(self) -> None:
    check_sides(self.train, self.validation)
    for prefix in (self.train, self.validation):
      if isinstance(prefix, str):
        idx_path(f"{prefix}-images-idx3-ubyte")

  def open(self) -> Opened:
    held_out = self.validation
    if isinstance(held_out, str):
      return Opened(idx_split(self.train, self.size), idx_split(held_out, self.size))
    return Opened(idx_split(self.train, self.size), held_out)


def check_sides(train: str, validation: float | str) -> None:
  """Refuses a share that is none, and held-out examples that are the training examples."""
  if isinstance(validation, str):
    there, here = (pathlib.Path(p).expanduser().resolve() for p in (validation, train))
    if there == here or there in here.parents or here in there.parents:
      raise Refused(
        f"validation {validation} is (in) what is trained on, {train}; held-out examples must not "
        "be trained on: name another, or give a share such as 0.1"
      )
  elif not 0 <= validation < 1:
    raise Refused(
      f"validation is {validation}: a share is at least 0 and below 1; or give the path of the "
      "held-out examples"
    )


def checked(inputs: np.ndarray, labels: np.ndarray, size: tuple[int, ...], name: str) -> ArraySplit:
  """The split of two arrays.

  Raises:
    Refused: they are not the (N, *size) and the N whole numbers that they should be.
  """
  if inputs.shape[1:] != size:
    raise Refused(f"{name} has examples of shape {inputs.shape[1:]}, not {size} as `size` says")
  if labels.shape != inputs.shape[:1]:
    raise Refused(f"{name} has {len(inputs)} examples but labels of shape {labels.shape}")
  if not np.issubdtype(labels.dtype, np.integer):
    raise Refused(f"{name} has labels of {labels.dtype}; they are integers from 0")
  if inputs.dtype.kind not in "fiu":
    raise Refused(f"{name} has examples of {inputs.dtype}; they are real numbers")
  return ArraySplit(inputs, labels, name)


def idx_split(prefix: str, size: tuple[int, ...]) -> ArraySplit:
  """The images and labels of a prefix."""
  images = read_idx(idx_path(f"{prefix}-images-idx3-ubyte"))
  labels = read_idx(idx_path(f"{prefix}-labels-idx1-ubyte"))
  return checked(images, labels, size, prefix)


def idx_path(name: str) -> pathlib.Path:
  """The file of that name, as it is or compressed."""
  paths = [pathlib.Path(name + suffix).expanduser() for suffix in IDX_SUFFIXES]
  found = next((path for path in paths if path.is_file()), None)
  if found is None:
    raise missing(name)
  return found


def read_idx(path: pathlib.Path) -> np.ndarray:
  """The array in an IDX file (yann.lecun.com/exdb/mnist): two zeros, type, dims, big-endian sizes.

  Raises:
    Refused: it is damaged, or no IDX file.
  """
  try:
    with IDX_SUFFIXES.get(path.suffix, open)(path, "rb") as file:
      data = file.read()
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
    raise Refused(f"{path} cannot be read: {error}") from error
  if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_TYPES:
    raise Refused(f"{path} is no IDX file")
  dtype, dims = np.dtype(IDX_TYPES[data[2]]), data[3]
  shape = tuple(np.frombuffer(data, ">u4", dims, 4).tolist()) if len(data) >= 4 + 4 * dims else ()
  if len(data) - 4 - 4 * dims != math.prod(shape) * dtype.itemsize:
    raise Refused(f"{path} holds {len(data):,} bytes, which is not what its header says")
  return np.frombuffer(data, dtype, offset=4 + 4 * dims).reshape(shape)
