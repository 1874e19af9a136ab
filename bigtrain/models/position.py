"""Positions: rotations of queries and keys, tables added to the embedding, biases of scores.

Dims: B batch, T position, D model, H head, h half of the head, P distance.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.mesh import platform
from bigtrain.parallel import embedding
from bigtrain.precision import raised


@config
class Llama3Scaling:
  """Slows rotations that do not turn once in the original context (Llama 3.1, arXiv:2407.21783)."""

  factor: float = 8.0  # How far the longest wavelengths are stretched.
  low: float = 1.0  # Wavelengths longer than original / low are stretched by the whole factor,
  high: float = 4.0  # those shorter than original / high not at all.
  original: int = 8192  # Positions of the first training.


@config
class Rotary:
  """Rotary embedding (Su et al. 2021, arXiv:2104.09864)."""

  theta: float = 10_000.0  # Wavelengths grow from 2 pi to 2 pi theta positions.
  scaling: Llama3Scaling | None = None  # For rows longer than those of the first training.


@config
class Learned:
  """One trained vector for each position (GPT-2)."""

  length: int  # Positions.

  def check(self) -> None:
    if self.length < 1:
      raise Refused(f"length is {self.length}; it must be positive")


@config
class Sinusoidal:
  """Fixed sines and cosines of geometric wavelengths (Vaswani et al. 2017, arXiv:1706.03762)."""

  wavelength: float = 10_000.0  # The longest, over 2 pi.


@config
class RelativeBuckets:
  """A learned bias of the scores of each head by the distance of the key, one for all layers.

  Short distances have a bucket each, longer ones share buckets that widen with the logarithm
  (Raffel et al. 2020, arXiv:1910.10683, section 2.1). Where attention is not causal, half of the
  buckets are for keys that come after the query.
  """

  buckets: int = 32
  distance: int = 128  # Columns from which on all keys share the last bucket.

  def check(self) -> None:
    if self.buckets < 4 or self.buckets % 2:
      raise Refused(f"relative: buckets is {self.buckets}; it is an even number, at least 4")
    if self.distance <= self.buckets // 2:
      raise Refused(
        f"relative: distance {self.distance} has a bucket of its own among {self.buckets}; set it "
        f"above {self.buckets // 2}"
      )


def frequencies(c: Rotary, head_dim: int) -> jax.Array:
  """Radians by position of each pair, (h,) float32."""
  freq_h = c.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  if (s := c.scaling) is None:
    return freq_h
  turns_h = s.original * freq_h / (2 * math.pi)  # In the original context.
  keep_h = jnp.clip((turns_h - s.low) / (s.high - s.low), 0.0, 1.0)
  return freq_h * (keep_h + (1 - keep_h) / s.factor)


def rotate(c: Rotary, x_BTKH: jax.Array, positions_BT: jax.Array, scale: float = 1.0) -> jax.Array:
  """Turns the pairs (h, h + H/2) of the last dim by the position; dims between T and H are free.

  The result is multiplied by `scale`, which costs nothing here.
  """
  H = x_BTKH.shape[-1]
  angle_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies(c, H)
  angle_BTh = jnp.expand_dims(angle_BTh, tuple(range(2, x_BTKH.ndim - 1)))
  twice = lambda a: jnp.concatenate([scale * a, scale * a], axis=-1)
  return _turned(x_BTKH, twice(jnp.cos(angle_BTh)), twice(jnp.sin(angle_BTh)))


@jax.custom_vjp
def _turned(x_BTKH, cos_BTKH, sin_BTKH) -> jax.Array:
  turned = x_BTKH.astype(raised(x_BTKH.dtype)) * cos_BTKH + _partners(x_BTKH) * sin_BTKH
  return turned.astype(x_BTKH.dtype)


def _turned_back(tables, g_BTKH):
  """The transpose of a rotation is the one by the negative angle."""
  cos_BTKH, sin_BTKH = tables
  return _turned(g_BTKH, cos_BTKH, -sin_BTKH), None, None


_turned.defvjp(lambda x, cos, sin: (_turned(x, cos, sin), (cos, sin)), _turned_back)


def _partners(x_BTKH) -> jax.Array:
  """(-b, a) of each pair (a, b), in the dtype in which sums are made."""
  wide, H = raised(x_BTKH.dtype), x_BTKH.shape[-1]
  if platform() != "tpu":
    a, b = jnp.split(x_BTKH.astype(wide), 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)
  # As an exact product of signs: the vector units are slow to move what is within a vector.
  signs_HH = np.eye(H, k=H // 2) - np.eye(H, k=-(H // 2))
  return jax.lax.dot_general(
    x_BTKH,
    jnp.asarray(signs_HH, x_BTKH.dtype),
    (((x_BTKH.ndim - 1,), (0,)), ((), ())),
    precision=None if x_BTKH.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
    preferred_element_type=wide,
  )


def bucket(c: RelativeBuckets, after_P: jax.Array, *, causal: bool) -> jax.Array:
  """The bucket of keys that are so many columns after their query, (P,) int32 below c.buckets."""
  n = c.buckets if causal else c.buckets // 2
  exact = n // 2
  # Made here, once: rounded on a device, a distance at the edge of a bucket could fall to its other
  # side. In float32, as the published ones.
  away = np.arange(c.distance + 1, dtype=np.float32)
  octaves = np.log(np.maximum(away, exact) / exact) / np.float32(math.log(c.distance / exact))
  far = exact + (octaves * (n - exact)).astype(np.int32)
  of_distance = np.where(away < exact, away, np.minimum(far, n - 1)).astype(np.int32)
  away_P = jnp.maximum(-after_P, 0) if causal else jnp.abs(after_P)
  bucket_P = jnp.asarray(of_distance)[jnp.minimum(away_P, c.distance)]
  return bucket_P if causal else bucket_P + n * (after_P > 0)


def sinusoid(c: Sinusoidal, positions_BT: jax.Array, dim: int) -> jax.Array:
  """(B, T, D) float32: sines in the first half, cosines in the second."""
  freq_h = c.wavelength ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  angle_BTh = positions_BT[..., None].astype(jnp.float32) * freq_h
  return jnp.concatenate([jnp.sin(angle_BTh), jnp.cos(angle_BTh)], axis=-1)


def lookup(table_VD: nnx.Param, ids_BT: jax.Array, dtype) -> jax.Array:
  """Rows of a stored table, (B, T, D) in `dtype`."""
  if (out := sharding.act("BTD")) is not None:
    split = sharding.split_over(table_VD[...], 1)  # Else each device looks up what it needs itself.
    ids_BT = jax.sharding.reshard(ids_BT, sharding.act("BT") if split else P(*out[:2]))
  return embedding.rows(table_VD[...], ids_BT, dtype)
