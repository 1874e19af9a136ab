"""What stands between two weight products: one setting for every network.

Dims: F hidden.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import taps
from bigtrain.models.initial import Initializer

# `gelu_tanh` is an approximation of gelu (GPT-2), `relu2` the square of relu.
ActivationName = Literal[
  "relu",
  "leaky_relu",
  "prelu",
  "elu",
  "gelu",
  "gelu_tanh",
  "silu",
  "relu2",
  "sigmoid",
  "tanh",
]
FUNCTIONS = {
  "relu": jax.nn.relu,
  "leaky_relu": jax.nn.leaky_relu,  # Slope 0.01 below 0 (Maas 2013).
  "elu": jax.nn.elu,  # Clevert 2015, arXiv:1511.07289.
  "gelu": functools.partial(jax.nn.gelu, approximate=False),  # Hendrycks 2016, arXiv:1606.08415.
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "silu": jax.nn.silu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668.
  "sigmoid": jax.nn.sigmoid,
  "tanh": jnp.tanh,
}


ENDS = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}  # Where these have no slope.


class Activation(nnx.Module):
  """One of these functions; `prelu` learns the slope below 0 of each unit (arXiv:1502.01852).

  The slopes begin at 0.25; being scales, they do not decay with the weights by default. `dim` is
  the letter of the units.
  """

  def __init__(self, name: ActivationName, units: int, init: Initializer, dim: str = "F"):
    self.name = name
    prelu = name == "prelu"
    self.negative_scale_F = init.constant(dim, {dim: units}, 0.25) if prelu else None

  def __call__(self, x_BTF: jax.Array) -> jax.Array:
    if self.negative_scale_F is None:
      y_BTF = FUNCTIONS[self.name](x_BTF)
    else:
      y_BTF = jnp.where(x_BTF >= 0, x_BTF, self.negative_scale_F[...].astype(x_BTF.dtype) * x_BTF)
    taps.tap("dead", dead, y_BTF)
    if self.name in ENDS:
      taps.tap("saturated", saturated, y_BTF, *ENDS[self.name])
    return y_BTF


def dead(y_BTF: jax.Array) -> jax.Array:
  """Which units are zero for every input, (F,) bool."""
  return jnp.all(y_BTF == 0, axis=tuple(range(y_BTF.ndim - 1)))


def saturated(y_BTF: jax.Array, low: float, high: float) -> jax.Array:
  """The share of outputs within a hundredth of the range from either of its ends."""
  margin = (high - low) / 100
  return jnp.mean(((y_BTF < low + margin) | (y_BTF > high - margin)).astype(jnp.float32))
