"""Small configs that stand for real ones in tests of what handles any config."""

from typing import Literal

from bigtrain.config import Refused, config
from bigtrain.experiment import (
  DataConfig,
  Experiment,
  ModelConfig,
  ObjectiveConfig,
  OptimizerConfig,
)


@config
class Scaling:
  factor: float = 8.0  # How far wavelengths stretch.


@config
class Rotary:
  theta: float = 10_000.0  # The longest wavelength.
  scaling: Scaling | None = None


@config
class Learned:
  length: int = 256  # Positions.


@config
class Attention:
  heads: int = 4  # Query heads.
  kv_heads: int | None = None  # As many as heads if None.
  position: Rotary | Learned | None = None

  def check(self) -> None:
    if self.heads % (self.kv_heads or self.heads):
      raise Refused(f"{self.heads} heads are not divisible by kv_heads={self.kv_heads}")


@config
class Model(ModelConfig):
  """A toy model."""

  vocab: int = 256
  dim: int = 64  # Width.
  layers: int = 2  # How many blocks.
  activation: Literal["relu", "silu"] = "relu"  # Of the hidden layer.
  pattern: tuple[Attention, ...] = (Attention(), Attention(position=Rotary()))
  position: Rotary | Learned | None = Learned()
  dropout: float | None = None
  tied: bool = True  # Input and output tables are one.

  def make(self, key):
    raise NotImplementedError

  def dims(self):
    kv = {f"pattern.{i}.kv_heads": ("K", a.kv_heads or a.heads) for i, a in enumerate(self.pattern)}
    return {"dim": ("D", self.dim), "vocab": ("V", self.vocab)} | kv

  def vocabulary(self):
    return self.vocab

  def longest_row(self):
    return self.position.length if isinstance(self.position, Learned) else None


@config
class Data(DataConfig):
  files: tuple[str, ...] = ("a.txt",)  # What is read.
  length: int = 256  # Tokens in a row.
  tokens: int | None = 256  # Of the tokenizer.

  def make(self, seed):
    raise NotImplementedError

  def vocabulary(self):
    return self.tokens

  def row_length(self):
    return self.length


@config
class Labelled(DataConfig):
  """Examples of some shape, each of a class."""

  shape: tuple[int, ...]
  classes: int

  def make(self, seed):
    raise NotImplementedError

  def n_classes(self):
    return self.classes

  def input_shape(self):
    return self.shape


@config
class Sgd(OptimizerConfig):
  lr: float = 0.1  # Peak learning rate.
  momentum: float = 0.9

  def make(self, steps, width=None):
    raise NotImplementedError

  def learning_rate(self, steps):
    raise NotImplementedError


@config
class Loss(ObjectiveConfig):
  z_loss: float = 0.0

  def __call__(self, model, batch, key):
    raise NotImplementedError


def experiment(**fields) -> Experiment:
  """A valid experiment, with some fields replaced."""
  parts = {"model": Model(), "data": Data(), "optimizer": Sgd(), "objective": Loss()}
  return Experiment(**{**parts, "steps": 100, "batch": 32} | fields)
