"""Normalisation over the last dim, in float32.

Dims: D the normalised dim, whatever it stands for.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain.config import config
from bigtrain.precision import raised


@config
class RMSNormConfig:
  """Zhang & Sennrich 2019, arXiv:1910.07467."""

  eps: float = 1e-6  # Added to the mean square.
  scale: bool = True  # A learned scale for each element.

  def make(self, dim: int) -> "RMSNorm":
    return RMSNorm(self, dim)


@config
class LayerNormConfig:
  """Ba et al. 2016, arXiv:1607.06450."""

  eps: float = 1e-5  # Added to the variance.
  bias: bool = True  # A learned offset for each element, besides the scale.

  def make(self, dim: int) -> "LayerNorm":
    return LayerNorm(self, dim)


NormConfig = RMSNormConfig | LayerNormConfig


class RMSNorm(nnx.Module):
  def __init__(self, c: RMSNormConfig, dim: int):
    self.c = c
    self.scale_D = nnx.Param(jnp.ones(dim)) if c.scale else None

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x32_BTD = x_BTD.astype(raised(x_BTD.dtype))
    y_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD**2, -1, keepdims=True) + self.c.eps)
    if self.scale_D is not None:
      y_BTD *= self.scale_D[...]
    return y_BTD.astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
  def __init__(self, c: LayerNormConfig, dim: int):
    self.c = c
    self.scale_D = nnx.Param(jnp.ones(dim))
    self.bias_D = nnx.Param(jnp.zeros(dim)) if c.bias else None

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x32_BTD = x_BTD.astype(raised(x_BTD.dtype))
    x32_BTD -= jnp.mean(x32_BTD, -1, keepdims=True)
    y_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD**2, -1, keepdims=True) + self.c.eps)
    y_BTD *= self.scale_D[...]
    if self.bias_D is not None:
      y_BTD += self.bias_D[...]
    return y_BTD.astype(x_BTD.dtype)
