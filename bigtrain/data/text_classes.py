"""Texts with classes: the rows of a file, and the novels in the package.

An example is one text or a pair of them, stored as JSON: a list of texts, or, of what cannot be
used, a string that says what is wrong with it.
"""

import csv
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bigtrain.config import Refused, config
from bigtrain.data.arrays import check_sides
from bigtrain.data.examples import OnError, Opened, Source, Split
from bigtrain.data.readers import Problem, lines
from bigtrain.data.sources import Austen, missing

KINDS = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LONGEST = 2**24  # Bytes of a line.


class Labelled(NamedTuple):
  texts: list[str] | str  # One or two, or what is wrong.
  label: int  # -1 if there is none.
  place: str  # For messages.


class TextSplit(Split):
  """Labelled texts, all of them in memory."""

  def __init__(self, found: list[Labelled]):
    self._raws = [json.dumps(texts).encode() for texts, _, _ in found]
    self._labels = np.array([label for _, label, _ in found], np.int64)
    self._places = [place for _, _, place in found]

  def __len__(self) -> int:
    return len(self._raws)

  def read(self, at: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    return [self._raws[i] for i in at.tolist()], self._labels[at]

  def where(self, i: int) -> str:
    return self._places[i]


@config
class LabelledFile(Source):
  """The rows of a file of labelled texts: .csv, .tsv, .jsonl (also .gz, .zst) or .parquet.

  The first line of .csv and .tsv names the columns.
  """

  train: str  # The file.
  names: tuple[str, ...]  # The classes, in the order of their numbers, as the file spells them.
  texts: tuple[str, ...] = ("text",)  # The column of the text, or the two of a pair.
  label: str = "label"  # The column of the class.
  validation: float | str = 0.1  # Held out: a share by a hash of the texts, or another file.
  on_error: OnError = "skip"

  def n_classes(self) -> int:
    return len(self.names)

  def shape(self) -> None:
    return None

  def texts_each(self) -> int:
    return len(self.texts)

  def errors(self) -> OnError:
    return self.on_error

  def about(self) -> str:
    return self.train

  def check(self) -> None:
    check_sides(self.train, self.validation)
    if not 1 <= len(self.texts) <= 2:
      raise Refused(f"texts names {len(self.texts)} columns; an example is a text, or a pair")
    if len(set(self.names)) < len(self.names):
      raise Refused(f"names has a class twice: {', '.join(self.names)}")
    for path in (self.train, self.validation):
      if not isinstance(path, str):
        continue
      if not pathlib.Path(path).expanduser().is_file():
        raise missing(path)
      if not path.endswith(KINDS):
        raise Refused(f"{path} is none of {', '.join(KINDS)}")

  def open(self) -> Opened:
    self.check()
    held_out = self.validation
    return Opened(
      self._split(self.train), self._split(held_out) if isinstance(held_out, str) else held_out
    )

  def _split(self, name: str) -> TextSplit:
    path = pathlib.Path(name).expanduser()
    return TextSplit([self._labelled(row, f"{name}:{n}") for n, row in self._rows(path)])

  def _rows(self, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each row and its line (in parquet its row), from 1; or what is wrong with it."""
    if path.suffix in (".csv", ".tsv"):
      return _table(path)
    return _parquet(path, [*self.texts, self.label]) if path.suffix == ".parquet" else _json(path)

  def _labelled(self, row: dict[str, Any] | str, place: str) -> Labelled:
    if isinstance(row, str):
      return Labelled(row, -1, place)
    for column in (*self.texts, self.label):
      if row.get(column) is None:
        return Labelled(f"has no {column!r}", -1, place)
    texts, label = [row[column] for column in self.texts], str(row[self.label])
    if not all(isinstance(text, str) for text in texts):
      return Labelled("has what is no text", -1, place)
    if label not in self.names:
      return Labelled(f"has no label of {', '.join(self.names)}", -1, place)
    return Labelled(texts, self.names.index(label), place)


@config
class Novels(Source):
  """Which of Jane Austen's six novels a passage is from; held out are passages of other chapters.

  Those chapters are the ones that `Austen` holds out.
  """

  words: int = 60  # Of a passage.

  def n_classes(self) -> int:
    return 6

  def shape(self) -> None:
    return None

  def about(self) -> str:
    return "passages of Jane Austen's novels"

  def check(self) -> None:
    if self.words < 1:
      raise Refused(f"words is {self.words}: a passage has at least 1")

  def open(self) -> Opened:
    sides: dict[bool, list[Labelled]] = {False: [], True: []}
    for novel, chapter, document in Austen().chapters():
      words = document.text.split()
      for i in range(0, len(words), self.words):
        passage = [" ".join(words[i : i + self.words])]
        place = f"chapter {chapter + 1} of novel {novel}, word {i}"
        sides[document.held_out].append(Labelled(passage, novel, place))
    return Opened(TextSplit(sides[False]), TextSplit(sides[True]))


def _table(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
  with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
    reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    while True:
      try:
        row = next(reader)
      except StopIteration:
        return
      except csv.Error:
        yield reader.line_num, "is no row of a table"
        continue
      # What took the place of bytes that are no text.
      bad = any("\ufffd" in value for value in row.values() if isinstance(value, str))
      yield reader.line_num, "has invalid UTF-8" if bad else row


def _json(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
  for n, data in lines(path, LONGEST, lambda read: None):
    if isinstance(data, Problem):
      yield n, f"is {data.kind}"
      continue
    try:
      row = json.loads(data)
    except ValueError:
      yield n, "is not JSON"
    else:
      yield n, row if isinstance(row, dict) else "is no object"


def _parquet(path: pathlib.Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
  import pyarrow
  import pyarrow.parquet

  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      there = [name for name in columns if name in file.schema_arrow.names]
      batches = (batch.to_pylist() for batch in file.iter_batches(columns=there))
      yield from enumerate((row for batch in batches for row in batch), 1)
  except (pyarrow.ArrowException, OSError) as error:
    raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
