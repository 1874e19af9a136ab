"""A network of dense layers that classifies vectors; of images it takes the pixels.

Layers alternate between two letters, D and F: over `tensor`, one splits its columns and the next
its rows, and the sum over devices comes once in two layers.

Dims: B batch, I inputs, D units of the first, third, ... layer, F of the second, fourth, ..., C
classes.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.experiment import ModelConfig
from bigtrain.hints import to_set
from bigtrain.models.activation import Activation, ActivationName
from bigtrain.models.initial import FanIn, Initializer, Mup, Normal
from bigtrain.models.norm import NormConfig
from bigtrain.precision import Dtype, compute_dtype, project
from bigtrain.width import Width, readout


@config
class MLPConfig(ModelConfig):
  """inputs -> hidden[0] -> hidden[1] -> ... -> classes, with biases."""

  inputs: int  # Features, or height * width * channels.
  hidden: tuple[int, ...]  # Units of each hidden layer.
  classes: int
  activation: ActivationName = "relu"
  norm: NormConfig | None = None  # Before each activation.
  residual: bool = False  # A layer as wide as the one before it adds to it.
  dropout: float = 0.0  # Of the units of each hidden layer.
  init: Normal | FanIn | Mup = dataclasses.field(default_factory=lambda: FanIn(scale=2.0))
  dtype: Dtype = "auto"  # Of activations: bfloat16 on accelerators, float32 on CPU.

  def make(self, key: jax.Array) -> "MLP":
    return MLP(self, key)

  def layers(self) -> list[tuple[str, int, int]]:
    """(letters, width before, width after) of each layer, the one to the classes included."""
    letters = "I" + "".join("DF"[i % 2] for i in range(len(self.hidden))) + "C"
    pairs = itertools.pairwise(zip(letters, (self.inputs, *self.hidden, self.classes), strict=True))
    return [(before + after, m, n) for (before, m), (after, n) in pairs]

  def dims(self) -> dict[str, tuple[str, int]]:
    return {f"hidden.{i}": ("DF"[i % 2], units) for i, units in enumerate(self.hidden)}

  def n_classes(self) -> int:
    return self.classes

  def check_inputs(self, shape: tuple[int, ...]) -> None:
    if (size := math.prod(shape)) != self.inputs:
      raise Refused(
        f"the model has {self.inputs} inputs but the data's examples have {size} numbers, "
        f"{tuple(shape)}; set {to_set('model.inputs', size)}"
      )

  def width(self) -> Width | None:
    if not isinstance(self.init, Mup):
      return None
    last = len(self.hidden)
    between = "|".join(map(str, range(1, last)))
    hidden, fixed = rf"layers\W+({between})\W+weight", rf"layers\W+{last}\W+bias"
    return self.init.width(self.hidden[0], hidden=hidden, fixed=fixed)

  def flops(self, length: int = 1) -> float:
    return 6.0 * sum(before * after for _, before, after in self.layers())

  def check(self) -> None:
    sizes = {"inputs": self.inputs, "classes": self.classes}
    sizes |= {f"hidden.{i}": units for i, units in enumerate(self.hidden)}
    for name, size in sizes.items():
      if size < 1:
        raise Refused(f"model: {name} is {size}; it must be positive")
    if not 0 <= self.dropout < 1:
      raise Refused(f"model: dropout is {self.dropout}; it is a rate, from 0 to below 1")
    if isinstance(self.init, Mup):
      if not self.hidden:
        raise Refused(
          "model: Mup is about hidden layers, of which hidden has none; set init to FanIn"
        )
      if self.init.head_dim is not None:
        raise Refused("model: a dense network has no heads; set its Mup's head_dim to None")
      for i, units in enumerate(self.hidden):
        self.init.check_size(f"hidden.{i}", units, self.hidden[0])
    if self.residual and not any(m == n for m, n in itertools.pairwise(self.hidden)):
      raise Refused(
        f"model: residual adds a layer to one of the same width, but of hidden {self.hidden} no "
        "two neighbours are equally wide; make some so, or leave residual off"
      )


class Dense(nnx.Module):
  """A weight, a bias and, for a hidden layer, its norm and its activation."""

  def __init__(self, c: MLPConfig, letters: str, before: int, after: int, key: jax.Array):
    self.letters = letters
    sizes = dict(zip(letters, (before, after), strict=True))
    init = Initializer(c.init, len(c.hidden), c.width())
    self.weight = init.weight(key, letters, sizes, fan_in=letters[0])
    self.bias = init.constant(letters[1], sizes)
    hidden = letters[1] != "C"
    self.norm = c.norm.make(after) if hidden and c.norm is not None else None
    self.activation = Activation(c.activation, after, init, letters[1]) if hidden else None

  def __call__(self, x: jax.Array) -> jax.Array:
    before, after = self.letters
    y = project(f"B{before},{self.letters}->B{after}", x, self.weight, self.bias)
    y = y if self.norm is None else self.norm(y)
    return y if self.activation is None else self.activation(y)


class MLP(nnx.Module):
  def __init__(self, c: MLPConfig, key: jax.Array):
    self.c = c
    keys = jax.random.split(key, len(c.hidden) + 1)
    self.layers = nnx.List([Dense(c, *layer, k) for layer, k in zip(c.layers(), keys, strict=True)])

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Logits (B, C) float32, without dropout."""
    return self.logits(jnp.asarray(inputs), None)

  def logits(self, inputs: jax.Array, key: jax.Array | None) -> jax.Array:
    """A score for each class, (B, C) float32; a key means training.

    Raises:
      Refused: a row has not as many numbers as the model has inputs.
    """
    self.c.check_inputs(inputs.shape[1:])
    x = jnp.reshape(inputs, (len(inputs), self.c.inputs), out_sharding=sharding.act("BI"))
    x = x.astype(compute_dtype(self.c.dtype))
    *hidden, last = self.layers
    keys = [None] * len(hidden) if key is None else jax.random.split(key, len(hidden))
    for i, (layer, k) in enumerate(zip(hidden, keys, strict=True)):
      with taps.named("layers", i):
        y = dropout(layer(x), self.c.dropout, k)
        if self.c.residual and x.shape == y.shape and layer is not hidden[0]:
          y += sharding.lay(x, f"B{layer.letters[1]}")
        taps.tap("output", taps.rms, y)
      x = y
    return last(readout(x, self.c.width())).astype(jnp.float32)
