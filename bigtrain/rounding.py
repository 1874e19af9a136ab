"""Rounding at random: to one of the two nearest numbers, so that the mean is what was rounded."""

import jax
import jax.numpy as jnp

from bigtrain import sharding


def to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 rounded up or down with the probability that makes it right in the mean.

  A bfloat16 is the upper half of a float32: a random number is added to the lower half, which is
  then cut off. The bits are the same on any mesh.
  """
  random = _bits(key, x, jnp.uint16).astype(jnp.uint32)
  moved = (jax.lax.bitcast_convert_type(x, jnp.uint32) + random) & jnp.uint32(0xFFFF0000)
  near = jax.lax.bitcast_convert_type(moved, jnp.float32)
  return jnp.where(jnp.isfinite(x), near, x).astype(jnp.bfloat16)  # NaN stays NaN.


def uniform(x: jax.Array, key: jax.Array) -> jax.Array:
  """Random float32 in [0, 1) for each element of `x`, in steps of 2^-16; the same on any mesh."""
  return _bits(key, x, jnp.uint16).astype(jnp.float32) * 2.0**-16


def _bits(key, x, dtype) -> jax.Array:
  place = None if sharding.act("") is None else jax.typeof(x).sharding.spec
  return jax.random.bits(key, x.shape, dtype, out_sharding=place)
