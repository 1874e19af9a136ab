"""A folder of images by class: FOLDER/CLASS/*.jpg, the classes numbered in order of their names."""

import os
import pathlib
from collections.abc import Iterable

import numpy as np

from bigtrain.config import Refused, config, nearest
from bigtrain.data.arrays import check_sides
from bigtrain.data.examples import OnError, Opened, OwnFiles, Split
from bigtrain.data.sources import missing
from bigtrain.hints import to_set

SHOWN = 10  # Names in a message.
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # No names of classes.


@config
class ImageFolder(OwnFiles):
  """Images in a folder for each class (JPEG, PNG, WebP, BMP); every visible file is an example."""

  train: str  # The folder that holds the folders of the classes.
  classes: int  # How many there are.
  validation: float | str = 0.1  # Held out: a share by a hash of the bytes, or another such folder.
  size: tuple[int, int] | None = None  # Height and width that all must have; None for any.
  on_error: OnError = "skip"

  def check(self) -> None:
    check_sides(self.train, self.validation)
    for folder in (self.train, self.validation):
      if isinstance(folder, str) and not pathlib.Path(folder).expanduser().is_dir():
        raise missing(folder)

  def open(self) -> Opened:
    self.check()
    names = self._names(self.train)
    if len(names) != self.classes:
      raise Refused(
        f"{self.train} has folders of {len(names)} classes, {_listed(names)}, but `classes` is "
        f"{self.classes}; set {to_set('data.source.classes', len(names))}"
      )
    if not isinstance(self.validation, str):
      return Opened(FolderSplit(self.train, names), self.validation)
    for name in self._names(self.validation):
      if name not in names:
        raise Refused(
          f"{self.validation} has a class {name!r}, not trained on{nearest(name, names)}"
        )
    return Opened(FolderSplit(self.train, names), FolderSplit(self.validation, names))

  def empty(self, labels: list[int]) -> str:
    folders = [f"{self.train}/{self._names(self.train)[label]}" for label in labels]
    given = self.classes - len(labels)
    one = len(labels) == 1
    return (
      f"{_listed(folders)} {'has' if one else 'have'} no image (class "
      f"{_listed(map(str, labels))}); add some, or remove the folder{'s' * (not one)} and "
      f"set {to_set('data.source.classes', given)}"
    )

  def _names(self, folder: str) -> list[str]:
    path = pathlib.Path(folder).expanduser()
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if not names:
      files = any(p.is_file() for p in path.iterdir())
      raise Refused(
        f"{folder} holds {'images' if files else 'nothing'}, not a folder of images for each class"
        + f"; give the folder above, {path.parent}" * files
      )
    if set(names) & SPLITS and set(names) <= SPLITS:
      parts = " and ".join(f"{folder}/{name}" for name in names)
      raise Refused(f"{folder} holds {parts}, not classes; give these as train and validation")
    return names


def _listed(names: Iterable[str]) -> str:
  first = list(names)
  return ", ".join(first[:SHOWN]) + ", ..." * (len(first) > SHOWN)


class FolderSplit(Split):
  """The files of a folder, in order of class and name."""

  def __init__(self, folder: str, names: list[str]):
    self._folder = os.path.expanduser(folder)
    self._files: list[str] = []  # CLASS/FILE.
    labels, stats = [], []
    for label, name in enumerate(names):
      at = os.path.join(self._folder, name)
      entries = os.scandir(at) if os.path.isdir(at) else ()
      files = sorted((e for e in entries if e.is_file() and e.name[0] != "."), key=lambda e: e.name)
      self._files += [os.path.join(name, e.name) for e in files]
      stats += [(s.st_size, s.st_mtime_ns) for s in (e.stat() for e in files)]
      labels += [label] * len(files)
    self._labels = np.array(labels, np.int64)
    self.key = repr((os.path.realpath(self._folder), self._files, labels, stats))

  def __len__(self) -> int:
    return len(self._files)

  def read(self, at: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    return [pathlib.Path(self.where(i)).read_bytes() for i in at.tolist()], self._labels[at]

  def where(self, i: int) -> str:
    return os.path.join(self._folder, self._files[i])
