"""Initial weights: the distributions, and the initializer that layers draw parameters from."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding
from bigtrain.config import config

Residual = Literal["scaled", "same", "zero"]


@config
class Normal:
  """Every weight from a normal distribution of one width (GPT-2, BERT)."""

  std: float = 0.02  # Standard deviation.
  # Products that write to the residual stream: `scaled` by 1/sqrt(2 * layers) (GPT-2), the `same`
  # as others, or `zero`, so that every block starts as the identity.
  residual: Residual = "scaled"

  def deviation(self, fan_in: int) -> float:
    return self.std


@config
class FanIn:
  """Normal with variance `scale` / fan_in (LeCun 1998 for scale 1)."""

  scale: float = 1.0  # 2 keeps the variance behind a ReLU (He et al. 2015, arXiv:1502.01852).
  residual: Residual = "same"  # As in Normal.

  def deviation(self, fan_in: int) -> float:
    return math.sqrt(self.scale / fan_in)


class Initializer:
  """Draws the parameters of a stack of `layers` layers, sharded as their letters say."""

  def __init__(self, c: Normal | FanIn, layers: int):
    self.c, self.layers = c, layers

  def weight(self, key, dims: str, sizes: dict[str, int], fan_in: str) -> nnx.Param:
    """A weight with these dims, of which the letters `fan_in` are contracted."""
    std = self.c.deviation(math.prod(sizes[d] for d in fan_in))
    return self._draw(key, dims, sizes, std)

  def residual(self, key, dims: str, sizes: dict[str, int], fan_in: str) -> nnx.Param:
    """A weight whose product is added to the residual stream."""
    std = self.c.deviation(math.prod(sizes[d] for d in fan_in))
    scale = {"scaled": (2 * self.layers) ** -0.5, "same": 1.0, "zero": 0.0}[self.c.residual]
    return self._draw(key, dims, sizes, std * scale)

  def constant(self, dims: str, sizes: dict[str, int], value: float = 0.0) -> nnx.Param:
    """A bias or a scale. It is small, so fsdp does not shard it."""
    shape = tuple(sizes[d] for d in dims)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=sharding.act(dims)))

  def _draw(self, key, dims, sizes, std) -> nnx.Param:
    shape = tuple(sizes[d] for d in dims)
    return nnx.Param(jax.random.normal(key, shape, out_sharding=sharding.weight(dims)) * std)
