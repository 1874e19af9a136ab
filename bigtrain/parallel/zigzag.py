"""The order of a row that a ring cuts, and random bits in that order.

Dims: B batch, T position.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p


def columns(length: int, shards: int) -> np.ndarray:
  """Which column of a row of that length lies at each place, where `shards` devices have its parts.

  Of 2n pieces device i holds pieces i and 2n - 1 - i, so that under a causal mask all devices have
  as many keys to look at (arXiv:2311.09431).
  """
  pieces = np.arange(length).reshape(2 * shards, -1)
  return np.concatenate([pieces[[i, -1 - i]].ravel() for i in range(shards)])


def bernoulli(key: jax.Array, p, *, shape: tuple[int, ...], shards: int) -> jax.Array:
  """`jax.random.bernoulli(key, p, shape)` of arrays (T, ...), T in the order of `columns`.

  Bits are a hash of an element's number, so that each device can make its own: what is made in
  order and then moved would be made, and kept, whole.
  """
  T, *rest = shape
  high_T, low_T = _product(columns(T, shards).astype(np.uint32), math.prod(rest))
  at = jnp.arange(math.prod(rest), dtype=np.uint32)
  low = low_T[:, None] + at
  high = high_T[:, None] + (low < at)
  a, b = threefry2x32_p.bind(*jax.random.key_data(key), high, low)
  # From 1 on to 2: the bits are those of the fraction.
  uniform = jax.lax.bitcast_convert_type((a ^ b) >> 9 | np.uint32(0x3F800000), np.float32) - 1
  return (uniform < p).reshape(shape)


def _product(a: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
  """The upper and the lower 32 bits of the product of two uint32."""
  (a1, a0), (b1, b0) = (a >> 16, a & 0xFFFF), (np.uint32(b >> 16), np.uint32(b & 0xFFFF))
  low = a0 * b0
  middle = a1 * b0 + (low >> 16)
  other = a0 * b1 + (middle & 0xFFFF)
  return a1 * b1 + (middle >> 16) + (other >> 16), (other << 16) | (low & 0xFFFF)
