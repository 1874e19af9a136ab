"""Labelled examples: what features and images have in common, from a source to batches.

A source (a @config) opens two splits, training and held-out, of examples that are reached by their
number. `survey` looks once at every example before training: what has no valid label, cannot be
decoded or is no number is kept out and counted, and so is a training example whose bytes are also
held out. What is left is shuffled by a keyed permutation, another one for each epoch.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bigtrain.config import Refused, config
from bigtrain.console import human
from bigtrain.data.shuffle import key_of, permute
from bigtrain.data.survey import Survey, survey
from bigtrain.experiment import Data, DataConfig

if TYPE_CHECKING:
  import jax

Raw = np.ndarray | bytes  # An example as it is stored: features, an image (uint8), an encoded image.
OnError = Literal["skip", "refuse"]  # Keep bad examples out and report them, or stop at the first.


class Split(abc.ABC):
  """Examples with random access, from any thread."""

  key: str | None = None  # Of the contents, to keep the survey by; None where a survey is quick.

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def read(self, at: np.ndarray) -> tuple[Sequence[Raw], np.ndarray]:
    """The examples of these numbers, and their labels (len(at),)."""

  @abc.abstractmethod
  def where(self, i: int) -> str:
    """Where an example lies, for messages."""


class Opened(NamedTuple):
  """What a source holds."""

  train: Split
  held_out: Split | float  # A split of its own; or the share of `train`, by a hash of the contents.


class Source(abc.ABC):
  """Where labelled examples come from: a @config. Opening it reads no more than it must."""

  __slots__ = ()

  @abc.abstractmethod
  def open(self) -> Opened:
    """The splits.

    Raises:
      Refused: something is not there, or not what it should be.
    """

  @abc.abstractmethod
  def n_classes(self) -> int:
    """Labels are 0 to this, exclusive; touches no data."""

  @abc.abstractmethod
  def shape(self) -> tuple[int, ...] | None:
    """Of every example; None for images of any size. Touches no data."""

  def name(self) -> str:
    """The source in a few words, for people."""
    return type(self).__name__

  def errors(self) -> OnError:
    """What becomes of bad examples."""
    return "refuse"

  def check(self) -> None: ...


def check_share(validation: float | str) -> None:
  """Refuses a share of held-out examples that is none."""
  if isinstance(validation, (int, float)) and not 0 <= validation < 1:
    raise Refused(f"validation is {validation}: a share is at least 0 and below 1")
