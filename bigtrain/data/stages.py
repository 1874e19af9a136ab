"""Stages: other data from a step on, such as longer rows or a better mixture at a run's end."""

import dataclasses
from typing import TYPE_CHECKING, Self

import numpy as np
from etils import epath

from bigtrain.config import Refused, config
from bigtrain.data.text import check_tokenizers
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.experiment import Data, DataConfig

if TYPE_CHECKING:
  import jax


@config
class Stages(DataConfig):
  """Data by step. The position goes on counting: a stage begins within its own epoch.

  Held-out data is that of the last stage, which is what the run is heading for.
  """

  stages: tuple[tuple[int, DataConfig], ...]  # (step, data): that data from that step on.

  def make(self, seed: int) -> "StagedData":
    return StagedData(tuple((step, data.make(seed)) for step, data in self.stages))

  def vocabulary(self) -> int | None:
    return self.stages[0][1].vocabulary()

  def row_length(self) -> int | None:
    return max((data.row_length() or 0 for _, data in self.stages), default=None)

  def n_token_types(self) -> int | None:
    return max((data.n_token_types() or 0 for _, data in self.stages), default=0) or None

  def n_classes(self) -> int | None:
    return self.stages[0][1].n_classes()

  def input_shape(self) -> tuple[int, ...] | None:
    return self.stages[0][1].input_shape()

  def read_tokenizer(self, path: epath.Path) -> Tokenizer | None:
    return self.stages[-1][1].read_tokenizer(path)

  def check(self) -> None:
    steps = [step for step, _ in self.stages]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
      raise Refused(f"stages begin at steps {steps}: the first is 0 and each is after the last")
    if len(sizes := {data.vocabulary() for _, data in self.stages}) > 1:
      raise Refused(f"stages have vocabularies of {sizes} tokens: give all the same tokenizer")
    if len(sizes := {(data.n_classes(), data.input_shape()) for _, data in self.stages}) > 1:
      raise Refused(f"stages differ in (classes, shape of inputs): {sizes}; give all the same")
    check_tokenizers((data for _, data in self.stages), "stages")

  def smoke(self) -> Self:
    return dataclasses.replace(self, stages=tuple((s, data.smoke()) for s, data in self.stages))


class StagedData(Data):
  """`stage` picks the data of a step; asked without a step, it is the first stage's."""

  def __init__(self, stages: tuple[tuple[int, Data], ...]):
    self._stages = stages

  def stage(self, step: int) -> Data:
    return next(data for start, data in reversed(self._stages) if start <= step)

  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    return self.stage(0).spec(size)

  def batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    return self.stage(0).batch(example, size, rows)

  def digest(self) -> str:
    return " ".join(str(data.digest()) for _, data in self._stages)

  def kept_out(self) -> str | None:
    found = dict.fromkeys(data.kept_out() for _, data in self._stages)
    return "; ".join(filter(None, found)) or None

  def about(self) -> str:
    return "; ".join(f"from step {step} on {data.about()}" for step, data in self._stages)

  @property
  def tokenizer(self) -> Tokenizer:
    return self._stages[-1][1].tokenizer

  def tokenizer_json(self) -> str | None:
    return self._stages[-1][1].tokenizer_json()

  def eval_examples(self) -> int:
    return self._stages[-1][1].eval_examples()

  def eval_batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    return self._stages[-1][1].eval_batch(example, size, rows)
