"""Experiment: the one root config, and the contracts of what stands in its fields.

An experiment file holds plain functions that return an Experiment. A new model, dataset, optimizer
or objective is a @config class that fulfils one of the contracts below; nothing registers it.
"""

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Self, TypeVar

from bigtrain.config import Refused, config
from bigtrain.faults import Faults
from bigtrain.mesh import Mesh
from bigtrain.products import Products

if TYPE_CHECKING:
  import jax
  import numpy as np
  import optax
  from etils import epath
  from flax import nnx

  from bigtrain.data.tokenizers import Tokenizer
  from bigtrain.objectives import Output
  from bigtrain.width import Width


class ModelConfig(abc.ABC):
  """A model's shape. `make` builds its module."""

  __slots__ = ()

  @abc.abstractmethod
  def make(self, key: "jax.Array") -> "nnx.Module":
    """The module with fresh float32 parameters; the same bits on any mesh."""

  def dims(self) -> dict[str, tuple[str, int]]:
    """{field: (dimension letter, size)} of every dim that a mesh axis must divide.

    The letters are those of `sharding.py`, as in {"kv_heads": ("K", 8), "vocab": ("V", 50304)}.
    """
    return {}

  def vocabulary(self) -> int | None:
    """How many tokens the model knows, checked against the data's; None without tokens."""
    return None

  def longest_row(self) -> int | None:
    """How many positions the model has; None for any number."""
    return None

  def n_token_types(self) -> int | None:
    """How many types of tokens the model tells apart; None without types."""
    return None

  def cuts_rows(self) -> bool:
    """Whether the model can be given rows whose positions lie on several devices.

    That is, whether all that looks at neighbours in a row goes through parallel/context.py.
    """
    return False

  def n_classes(self) -> int | None:
    """How many classes the model tells apart, checked against the data's; None without classes."""
    return None

  def classes_of(self, shape: tuple[int, ...]) -> int | None:
    """The same of a model whose outputs alone say it, for `inputs` of that shape.

    Raises:
      Refused: the model does not take such inputs.
    """
    return self.n_classes()

  def check_inputs(self, shape: tuple[int, ...]) -> None:
    """Refuses `inputs` of that shape, (height, width, channels) of an image, if it takes others."""

  def check_objective(self, objective: "ObjectiveConfig") -> None:
    """Refuses an objective that would call the model in another way than it wants."""

  def width(self) -> "Width | None":
    """How much wider this is than the model whose learning rate was tuned; None if it is that."""
    return None

  def flops(self, length: int = 1) -> float | None:
    """Model FLOPs of training on one row of that length, by formula; None if not known.

    An encoder-decoder also takes the length of the targets, which its decoder reads.
    """
    return None

  def check(self) -> None:
    """Refuses impossible combinations of fields by raising `Refused`."""

  def smoke(self) -> Self:
    """A copy that trains in seconds on a CPU, for --smoke, where smoke.py's caps are not enough."""
    return self


class OptimizerConfig(abc.ABC):
  """An optimizer with its schedule."""

  __slots__ = ()

  @abc.abstractmethod
  def make(self, steps: int, width: "Width | None" = None) -> "optax.GradientTransformation":
    """The gradient transformation of a run of that many steps, of a model of that width.

    Raises:
      Refused: there is a width, and no rule of how it changes the learning rates.
    """

  @abc.abstractmethod
  def learning_rate(self, steps: int) -> "optax.Schedule":
    """The learning rate as a function of the step, for the record."""

  def check(self) -> None: ...


SOURCE = "source/"  # How the names of arrays begin that say of which source a row is.


class Data(abc.ABC):
  """A prepared dataset. Batches are pure functions of their arguments and the seed it has.

  A batch is a dict of numpy arrays whose first dim is the batch. Language data has, all (B, T):
  `tokens` int32, `targets` int32, `weights` float32 (0 where nothing is predicted), `segments`
  int32 (document number within the row from 1; 0 is padding) and `positions` int32 (from 0 within
  each document). Masked text also has `token_types` int32; others in evaluation `bytes` float32:
  the UTF-8 bytes of each target. Where targets are a decoder's own row, they and `weights` are as
  long as that, and `target_positions` and `target_segments` are about it.
  Data of classes has `labels` int32 (B,), `weights` float32 (B,), 0 for padding, and `inputs`
  float32 (B, ...), images as (B, height, width, channels); or, of text, `tokens`, `segments` and
  `token_types`. A mixture also has `source/<name>` float32 (B,) for each of its sources: 1 where
  the row is of that source.
  """

  @abc.abstractmethod
  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    """Shapes and dtypes of a global batch of `size` rows, touching no data."""

  @abc.abstractmethod
  def batch(self, example: int, size: int, rows: "slice | None" = None) -> "dict[str, np.ndarray]":
    """Rows `rows` (all if None) of the batch of `size` examples from global index `example` on."""

  def examples(self) -> int:
    """How many examples (rows) an epoch has."""
    raise Refused("this data has no epochs: give the run's length in steps")

  def digest(self) -> str | None:
    """Of what decides the batches besides the config, such as files; a resumed run must find it."""
    return None

  def kept_out(self) -> str | None:
    """What of the input is not in the data, in one line; None if all is."""
    return None

  def about(self) -> str:
    """How much there is to learn from, in a few words for people; "" if that is not known."""
    return ""

  @property
  def tokenizer(self) -> "Tokenizer":
    """What turns text into tokens and back."""
    raise Refused("this experiment's data is not text: there is nothing to sample")

  def tokenizer_json(self) -> str | None:
    """What a run directory keeps for `DataConfig.read_tokenizer`, if that needs anything."""
    return None

  @abc.abstractmethod
  def eval_examples(self) -> int:
    """How many examples (rows) the held-out split has."""

  @abc.abstractmethod
  def eval_batch(
    self, example: int, size: int, rows: "slice | None" = None
  ) -> "dict[str, np.ndarray]":
    """Held-out rows in a fixed order, each once; past the last one, padding of weight 0."""

  def stage(self, step: int) -> "Data":
    """The data that update `step` (from 0) consumes, where it changes in the course of the run."""
    return self


class DataConfig(abc.ABC):
  """Where examples come from and how they are prepared."""

  __slots__ = ()

  @abc.abstractmethod
  def make(self, seed: int) -> Data:
    """The dataset, prepared (and cached) where that is needed."""

  def vocabulary(self) -> int | None:
    """How many tokens the tokenizer has, touching no data; None without tokens."""
    return None

  def row_length(self) -> int | None:
    """Tokens of the longest row, touching no data; None without tokens."""
    return None

  def n_token_types(self) -> int | None:
    """How many types its tokens are of, touching no data; None without types."""
    return None

  def n_classes(self) -> int | None:
    """How many classes labels are of, touching no data; None without labels."""
    return None

  def input_shape(self) -> tuple[int, ...] | None:
    """Of the `inputs` of one example, touching no data; None without inputs."""
    return None

  def read_tokenizer(self, path: "epath.Path") -> "Tokenizer | None":
    """The tokenizer that a run kept in a file, touching no data; None if there is none."""
    return None

  def check(self) -> None: ...

  def smoke(self) -> Self:
    """A copy that is prepared and read in seconds, for --smoke."""
    return self


class ObjectiveConfig(abc.ABC):
  """What is minimised."""

  __slots__ = ()

  takes: ClassVar[str] = ""  # Which models and data, for who gave it others.

  @abc.abstractmethod
  def __call__(
    self, model: "nnx.Module", batch: "dict[str, jax.Array]", key: "jax.Array | None"
  ) -> "Output":
    """Sums over this batch. `key` is None in evaluation (no dropout)."""

  def derived(self, means: dict[str, float]) -> dict[str, float]:
    """Metrics of a whole evaluation that are no means themselves, from those that are."""
    return {}

  def check(self) -> None: ...


@config
class Evaluation:
  """Evaluation on the held-out split, every example exactly once."""

  every: int = 500  # Steps; 0 only at the end.
  batch: int = 32  # Rows.
  prompts: tuple[str, ...] = ()  # Continued at every evaluation.
  sample_tokens: int = 100  # Length of each continuation.
  temperature: float = 0.8  # Of these continuations; 0 takes the likeliest token.


@config
class Checkpoints:
  """When the run is saved and what is kept. The last step is always saved."""

  every: int = 500  # Steps.
  keep: int = 2  # The newest ones.
  keep_every: int | None = None  # Steps; multiples of it are saved too, and kept for ever.
  verify: float = 1.0  # Share of the arrays of a save that are read back before it counts as one.
  within: float = 1800.0  # Seconds in which a save must be durable and verified.

  def check(self) -> None:
    if self.verify > 1:
      raise Refused(f"checkpoints.verify is {self.verify}; it is a share, 1.0 for all arrays")


@config
class Logging:
  """What is written while training."""

  every: int = 10  # Steps between rows of metrics.jsonl and lines on the console.
  layers_every: int = 100  # Steps between statistics of every layer, for `diagnose`; 0 for none.
  tensorboard: bool = True  # Also write TensorBoard files.


M = TypeVar("M", bound=ModelConfig)
D = TypeVar("D", bound=DataConfig)
U = TypeVar("U", bound=OptimizerConfig)  # It makes updates.
L = TypeVar("L", bound=ObjectiveConfig)  # It makes losses.


@config
class Experiment(Generic[M, D, U, L]):
  """Everything that decides what a run computes.

  Generic for type checkers alone: after `e = base()`, `e.model.layers` needs no cast.
  """

  model: M
  data: D
  optimizer: U
  objective: L
  batch: int  # Global batch, rows.
  steps: int = 0  # Updates; 0 where `epochs` says how many.
  epochs: float | None = None  # Passes over the training examples, in place of `steps`.
  batch_stages: tuple[tuple[int, int], ...] = ()  # (step, batch): that batch from that step on.
  microbatches: int = 1  # Equal parts of the batch whose gradients are added up before an update.
  optimizer_on_host: bool = False  # Its state waits in the host's memory between updates.
  products: Products | None = None  # Weight products in eight bits; None: in the compute dtype.
  # How parameters are stored. Matrices in `bfloat16` are updated in float32 and rounded at random,
  # up or down in proportion, so that small updates are not lost (arXiv:2010.06192).
  weights: Literal["float32", "bfloat16"] = "float32"
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
  checkpoints: Checkpoints = dataclasses.field(default_factory=Checkpoints)
  faults: Faults = dataclasses.field(default_factory=Faults)
  logging: Logging = dataclasses.field(default_factory=Logging)
  # Where this run's first weights are from: a run directory, whose newest ones it takes, or a file
  # of Hugging Face weights, NAME.safetensors.
  weights_from: str | None = None
  # Parameters that begin fresh all the same, by how their names begin, as in "classes". All others
  # must be there; what is there besides is left out.
  new_weights: tuple[str, ...] = ()
  seed: int = 0  # Of initialisation, data order and dropout.
