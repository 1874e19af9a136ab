"""Datasets of TensorFlow Datasets by name, without TensorFlow: extra `data`.

They are read at random by `tfds.data_source`, so they must be prepared as array_record or parquet
(`tfds build NAME --file_format=array_record`). Images stay encoded until a batch needs them.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigtrain.config import Refused, config
from bigtrain.data.examples import OnError, Opened, OwnFiles, Split

# No namespaces, which fetch code, no arguments of a builder, no way out of the folder.
NAME = re.compile(r"[A-Za-z]\w*(/[\w+-][\w.+-]*)?(:[\d*]+(\.[\d*]+){2})?")


@config
class TFDS(OwnFiles):
  """A prepared dataset with an image, or an array of numbers, and a label."""

  name: str  # Such as cifar10, or imagenet2012:5.1.0.
  classes: int  # How many the dataset has.
  train: str = "train"  # A split, also a slice of one, such as "train[:90%]".
  validation: float | str = "test"  # Held out: another split, or a share by a hash of the bytes.
  input: str = "image"  # The name of the feature to classify.
  label: str = "label"  # The name of the feature with its class.
  size: tuple[int, ...] | None = None  # Shape of every example; None for images of any size.
  data_dir: str | None = None  # Where datasets are prepared; tfds's own choice unless given.
  on_error: OnError = "skip"

  def about(self) -> str:
    return f"{self.name} of tfds"

  def check(self) -> None:
    if not NAME.fullmatch(self.name):
      raise Refused(
        f"{self.name!r} is no name of a dataset: give NAME, NAME/CONFIG or NAME:1.2.3, as in "
        "imagenet2012:5.1.0"
      )
    if self.validation == self.train:
      raise Refused(
        f"validation is {self.train}, which is trained on; name another split, or give a share"
      )
    if isinstance(self.validation, (int, float)) and not 0 <= self.validation < 1:
      raise Refused(f"validation is {self.validation}: a share is at least 0 and below 1")

  def open(self) -> Opened:
    held_out = self.validation
    split = lambda name: TFDSSplit(self, name)
    return Opened(split(self.train), split(held_out) if isinstance(held_out, str) else held_out)


class TFDSSplit(Split):
  """A split that is read through `tfds.data_source`."""

  def __init__(self, c: TFDS, split: str):
    self._config, self._split = c, split
    tfds = _tfds()
    data_dir = None if c.data_dir is None else os.path.expanduser(c.data_dir)
    c.check()
    _check_features(pathlib.Path(data_dir or tfds.core.constants.DATA_DIR), c.name)
    try:
      builder = tfds.builder(c.name, data_dir=data_dir)
      info, kinds = builder.info, builder.info.features
    except Exception as error:  # It raises many kinds, with long lists of all names.
      raise Refused(f"tfds cannot find {c.name}: {_first_line(error)}") from error
    for name in (c.input, c.label):
      if name not in kinds:
        raise Refused(f"{c.name} has no feature {name!r}; there is {', '.join(kinds)}")
    known = getattr(kinds[c.label], "num_classes", None)
    if known is not None and known != c.classes:
      raise Refused(f"{c.name} has {known} classes, but `classes` is {c.classes}")
    images = [name for name, kind in kinds.items() if isinstance(kind, tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    try:
      self._examples: Any = tfds.data_source(
        c.name, split=split, data_dir=data_dir, decoders=decoders, download=False
      )
    except Exception as error:
      raise Refused(
        f"tfds cannot open {c.name} {split}: {_first_line(error)}; prepare it by `tfds build "
        f"{c.name} --file_format=array_record`"
      ) from error
    stored = []
    for part in info.splits[split].file_instructions:
      stat = (builder.data_path / part.filename).stat()
      stored.append((part.filename, part.skip, part.take, stat.length, stat.mtime))
    self.key = repr((info.full_name, str(builder.data_path), stored, c.input, c.label))

  def __len__(self) -> int:
    return len(self._examples)

  def read(self, at: np.ndarray) -> tuple[list[Any], np.ndarray]:
    c = self._config
    found = self._examples.__getitems__(at.tolist())
    return [x[c.input] for x in found], np.array([x[c.label] for x in found], np.int64)

  def where(self, i: int) -> str:
    return f"{self._config.name} {self._split}[{i}]"


def _check_features(data_dir: pathlib.Path, name: str) -> None:
  """Refuses a prepared dataset of which tfds would import a module that the data names."""
  folder = data_dir.expanduser() / re.split("[/:]", name)[0]
  for path in folder.glob("**/features.json"):
    for kind in _classes(json.loads(path.read_text())):
      if not kind.startswith("tensorflow_datasets."):
        raise Refused(f"{path} names the class {kind}, which is not one of tfds's own")


def _classes(tree: Any) -> Iterator[str]:
  """The names of classes in a features.json, in each way in which they can be given."""
  if isinstance(tree, list):
    for item in tree:
      yield from _classes(item)
  elif isinstance(tree, dict):
    for name, item in tree.items():
      if name in ("pythonClassName", "python_class_name", "type") and "." in str(item):
        yield str(item)
      else:
        yield from _classes(item)


def _tfds() -> Any:
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise Refused(f"TFDS needs the extra `data` (uv run --extra data ...): {error}") from error
  return tensorflow_datasets


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
