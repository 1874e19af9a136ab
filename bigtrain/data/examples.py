"""Labelled examples: what features and images have in common, from a source to batches.

A source (a @config) opens two splits, training and held-out, of examples that are reached by their
number. Before training every example is looked at once: what has no valid label, cannot be decoded
or is no number is kept out and counted, and so is a training example whose bytes are also held out.
What is left is shuffled by a keyed permutation, another one for each epoch.

Dims: B batch, N examples of a split.
"""

import abc
import collections
import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bigtrain.config import Refused
from bigtrain.data.shuffle import hashes, key_of, permute
from bigtrain.data.survey import Problem, Survey, survey
from bigtrain.experiment import Data

if TYPE_CHECKING:
  import jax

Raw = np.ndarray | bytes  # As stored: features, an image of uint8, an encoded image, or text.
Fields = dict[str, tuple[tuple[int, ...], type[np.generic]]]  # Shape of one and dtype, by name.
OnError = Literal["skip", "refuse"]  # Keep bad examples out and report them, or stop at the first.
SHOWN = 3  # Examples that a report of bad input names.


class Split(abc.ABC):
  """Examples with random access, from any thread."""

  key: str | None = None  # Of the contents, to keep the survey by; None where looking is quick.

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def read(self, at: np.ndarray) -> tuple[Sequence[Raw], np.ndarray]:
    """The examples of these numbers, and their labels, (len(at),)."""

  @abc.abstractmethod
  def where(self, i: int) -> str:
    """Where an example lies, for messages."""


class Opened(NamedTuple):
  """What a source holds."""

  train: Split
  held_out: Split | float  # A split of its own, or a share of `train` by the hash of the bytes.


class Source(abc.ABC):
  """Where labelled examples come from. A new one is a @config class in a file of its own."""

  __slots__ = ()

  @abc.abstractmethod
  def open(self) -> Opened:
    """The splits.

    Raises:
      Refused: something is not there, or not what it should be.
    """

  @abc.abstractmethod
  def n_classes(self) -> int:
    """Labels are from 0 to below this. Touches no data."""

  @abc.abstractmethod
  def shape(self) -> tuple[int, ...] | None:
    """Of every example; None for images of any size. Touches no data."""

  def texts_each(self) -> int:
    """How many texts an example of text has, 1 or 2. Touches no data."""
    return 1

  def about(self) -> str:
    """Which data this is, for people."""
    return type(self).__name__

  def errors(self) -> OnError:
    """What becomes of bad examples."""
    return "refuse"

  def empty(self, labels: list[int]) -> str:
    """What to do where no training example is of these classes."""
    which = ", ".join(map(str, labels[:10])) + ", ..." * (len(labels) > 10)
    return (
      f"{self.about()} has no training example of class {which}: labels count from 0, and "
      f"{self.n_classes()} classes are said to be there; correct the labels or the source's "
      "`classes`"
    )

  def check(self) -> None: ...


class OwnFiles(Source):
  """A source that lies outside the package: its fields say what is in it."""

  __slots__ = ()

  train: str
  classes: int
  size: tuple[int, ...] | None
  on_error: OnError

  def n_classes(self) -> int:
    return self.classes

  def shape(self) -> tuple[int, ...] | None:
    return self.size

  def errors(self) -> OnError:
    return self.on_error

  def about(self) -> str:
    return self.train


class Side(NamedTuple):
  """The usable examples of one side."""

  split: Split
  at: np.ndarray  # (N,) Their numbers in the split.
  labels: np.ndarray  # (N,) int32.


class Sides(NamedTuple):
  train: Side
  held_out: Side
  digest: str
  kept_out: str | None


class ExampleData(Data):
  """Batches of inputs, `labels` and `weights`. Nothing is opened before it is needed."""

  version: str  # Changes with what `problem` finds.

  def __init__(self, source: Source, fields: Fields, seed: int):
    self._source, self._fields, self._seed = source, fields, seed

  @abc.abstractmethod
  def problem(self, raw: Raw) -> Problem:
    """What is wrong with an example, if anything is."""

  @abc.abstractmethod
  def inputs(self, raws: Sequence[Raw], keys: np.ndarray | None) -> dict[str, np.ndarray]:
    """Inputs of B examples, of the names, shapes and dtypes that were given.

    Args:
      raws: B examples.
      keys: one of each example for its random changes, (B,) uint64; None in evaluation.
    """

  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    import jax

    kinds: Fields = self._fields | {"labels": ((), np.int32), "weights": ((), np.float32)}
    return {k: jax.ShapeDtypeStruct((size, *shape), kind) for k, (shape, kind) in kinds.items()}

  def batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    examples = example + np.arange(size)[rows or slice(None)]
    train = self._sides.train
    epochs, within = np.divmod(examples, len(train.at))
    order = permute(within, len(train.at), hashes(key_of(self._seed, 0), epochs))
    return self._read(train, order, hashes(key_of(self._seed, 1), examples))

  def eval_batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    examples = example + np.arange(size)[rows or slice(None)]
    there = examples < self.eval_examples()
    found = self._read(self._sides.held_out, examples[there], None)
    batch = {k: np.zeros((len(there), *x.shape[1:]), x.dtype) for k, x in found.items()}
    for name, values in found.items():
      batch[name][there] = values
    return batch

  def examples(self) -> int:
    return len(self._sides.train.at)

  def eval_examples(self) -> int:
    return len(self._sides.held_out.at)

  def digest(self) -> str:
    """Of the bytes and labels of all examples in use, and their order; not of where they lie."""
    return self._sides.digest

  def kept_out(self) -> str | None:
    return self._sides.kept_out

  def about(self) -> str:
    counts = f"{self.examples():,} examples of {self._source.n_classes()} classes"
    return f"{self._source.about()}: {counts}, {self.eval_examples():,} held out"

  def _read(self, side: Side, order: np.ndarray, keys: np.ndarray | None) -> dict[str, np.ndarray]:
    at = side.at[order]
    if len(at):
      found = self.inputs(side.split.read(at)[0], keys)
    else:
      found = {name: np.zeros((0, *shape), kind) for name, (shape, kind) in self._fields.items()}
    return found | {"labels": side.labels[order], "weights": np.ones(len(at), np.float32)}

  @functools.cached_property
  def _sides(self) -> Sides:
    opened = self._source.open()
    train = survey(opened.train, self.problem, self.version)
    bad = self._bad(train)
    if isinstance(opened.held_out, Split):
      split, held_out = opened.held_out, survey(opened.held_out, self.problem, self.version)
      bad_held_out = self._bad(held_out)
      for i in np.flatnonzero(np.isin(train.hashes, held_out.hashes)).tolist():
        bad.setdefault(i, "is also held out")
      report = [(f"{opened.train.where(i)} {said}", said) for i, said in bad.items()]
      report += [(f"{split.where(i)} {said}", said) for i, said in bad_held_out.items()]
      mine, theirs = _kept(train, bad), _kept(held_out, bad_held_out)
    else:
      split, held_out, kept = opened.train, train, _kept(train, bad)
      report = [(f"{split.where(i)} {said}", said) for i, said in bad.items()]
      chosen = train.hashes[kept] < opened.held_out * 2.0**64
      mine, theirs = kept[~chosen], kept[chosen]
    kept_out = self._report(report)
    self._check_classes(train.labels[mine], kept_out)
    if not len(theirs) and (split is not opened.train or opened.held_out):
      raise Refused(
        f"{self._source.about()} holds out none of its examples, {len(mine):,} of which can be "
        f"trained on: set validation to a larger share or to another split, or to 0 to evaluate "
        f"nothing" + f"; {kept_out}" * (kept_out is not None)
      )
    digest = hashlib.sha256()
    for found, at in ((train, mine), (held_out, theirs)):
      digest.update(found.hashes[at].tobytes() + b"|" + found.labels[at].tobytes() + b"|")
    return Sides(
      Side(opened.train, mine, train.labels[mine].astype(np.int32)),
      Side(split, theirs, held_out.labels[theirs].astype(np.int32)),
      digest.hexdigest()[:32],
      kept_out,
    )

  def _bad(self, found: Survey) -> dict[int, str]:
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= self._source.n_classes()))
    outside = f"has a label outside 0 to {self._source.n_classes() - 1}"
    return found.problems | {i: outside for i in wrong.tolist() if i not in found.problems}

  def _report(self, report: list[tuple[str, str]]) -> str | None:
    """What is wrong with the input, in one line.

    Raises:
      Refused: anything is, and the source refuses that.
    """
    if not report:
      return None
    kinds = collections.Counter(said for _, said in report)
    counts = ", ".join(f"{n} {_plural(said) if n > 1 else said}" for said, n in kinds.items())
    first = "; ".join(line for line, _ in report[:SHOWN])
    if self._source.errors() == "refuse":
      raise Refused(f"bad examples: {counts}; first {first}; remove them, or set on_error='skip'")
    return f"kept out of the data: {counts}; first {first}"

  def _check_classes(self, labels: np.ndarray, kept_out: str | None) -> None:
    if not len(labels):
      raise Refused(
        f"{self._source.about()} has no example to train on; {kept_out or 'it is empty'}"
      )
    counts = np.bincount(labels, minlength=self._source.n_classes())
    if len(empty := np.flatnonzero(counts == 0)):
      told = f"; {kept_out}" * (kept_out is not None)
      raise Refused(self._source.empty(empty.tolist()) + told)


def _plural(said: str) -> str:
  """What is said of one example, of several."""
  verb, _, rest = said.partition(" ")
  return f"{ {'is': 'are', 'has': 'have'}.get(verb, verb) } {rest}"


def _kept(found: Survey, bad: dict[int, str]) -> np.ndarray:
  keep = np.ones(len(found.labels), bool)
  keep[list(bad)] = False
  return np.flatnonzero(keep)
