"""Initial weights: the distributions, and the initializer that layers draw parameters from."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.width import WIDE, Width

Residual = Literal["scaled", "same", "zero"]


@config
class Normal:
  """Every weight from a normal distribution of one width (GPT-2, BERT)."""

  std: float = 0.02  # Standard deviation.
  # Products that write to the residual stream: `scaled` by 1/sqrt(2 * layers) (GPT-2), the `same`
  # as others, or `zero`, so that every block starts as the identity.
  residual: Residual = "scaled"

  def deviation(self, fan_in: float) -> float:
    return self.std


@config
class FanIn:
  """Normal with variance `scale` / fan_in (LeCun 1998 for scale 1)."""

  scale: float = 1.0  # 2 keeps the variance behind a ReLU (He et al. 2015, arXiv:1502.01852).
  residual: Residual = "same"  # As in Normal.

  def deviation(self, fan_in: float) -> float:
    return math.sqrt(self.scale / fan_in)


@config
class Mup:
  """A learning rate tuned on a narrow model holds on this one (muP, arXiv:2203.03466).

  At the base it is `at_base` and nothing else. In a wider model hidden weights begin smaller and
  learn slower, logits and attention scores shrink: width.py has the rules.
  """

  base: int  # The model's dim, or its first hidden layer, where the learning rate was tuned.
  head_dim: int | None = None  # That of its heads; None for a network without heads.
  at_base: Normal | FanIn = Normal()  # How it is initialised.

  def check(self) -> None:
    for name in ("base", "head_dim"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise Refused(f"{name} is {value}; it must be positive")

  def width(self, dim: int, head_dim: int | None = None, **paths: str) -> Width:
    """Of a model with these dims; `paths` as Width has them."""
    head = head_dim / self.head_dim if head_dim and self.head_dim else 1.0
    return Width(dim / self.base, head, **paths)

  def check_size(self, name: str, size: int, dim: int, unit: int = 1) -> None:
    """Refuses a width that grew from none of the base, where it was a multiple of `unit`."""
    at_base = size * self.base / dim
    if at_base % unit:
      raise Refused(
        f"model: Mup grows all widths in proportion: where the model is {dim} wide {name} is "
        f"{size}, so at the base of {self.base} it would be {at_base:g}, no multiple of {unit}"
      )


class Initializer:
  """Draws the parameters of a stack of `layers` layers, sharded as their letters say.

  A weight keeps these letters as its `dims`; what was stacked has dims in front of them.

  `width` is the model's, which it also gives to `readout`: Mup needs it.

  Raises:
    Refused: Mup without a width, in a model that was written without it.
  """

  def __init__(self, c: Normal | FanIn | Mup, layers: int, width: Width | None = None):
    if isinstance(c, Mup) and width is None:
      raise Refused("model: this one has no rules for Mup; set its init to Normal or FanIn")
    self.c, self.layers, self.width = c.at_base if isinstance(c, Mup) else c, layers, width

  def weight(self, key, dims: str, sizes: dict[str, int], fan_in: str) -> nnx.Param:
    """A weight with these dims, of which the letters `fan_in` are contracted."""
    return self._draw(key, dims, sizes, self._deviation(dims, sizes, fan_in))

  def residual(self, key, dims: str, sizes: dict[str, int], fan_in: str) -> nnx.Param:
    """A weight whose product is added to the residual stream."""
    std = self._deviation(dims, sizes, fan_in)
    scale = {"scaled": (2 * self.layers) ** -0.5, "same": 1.0, "zero": 0.0}[self.c.residual]
    return self._draw(key, dims, sizes, std * scale)

  def constant(self, dims: str, sizes: dict[str, int], value: float = 0.0) -> nnx.Param:
    """A bias or a scale. It is small, so fsdp does not shard it."""
    shape = tuple(sizes[d] for d in dims)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=sharding.act(dims)))

  def _deviation(self, dims: str, sizes: dict[str, int], fan_in: str) -> float:
    size = math.prod(sizes[d] for d in fan_in)
    if self.width is None or not WIDE.issuperset(fan_in):
      return self.c.deviation(size)
    hidden = WIDE.issuperset(dims)
    std = self.c.deviation(size / self.width.ratio)
    return std * self.width.ratio**-0.5 if hidden else std

  def _draw(self, key, dims, sizes, std) -> nnx.Param:
    shape = tuple(sizes[d] for d in dims)
    w = jax.random.normal(key, shape, out_sharding=sharding.weight(dims)) * std
    return nnx.Param(w, dims=dims)
