"""Dropout, whose bits are the same on any mesh.

Dims: B batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from bigtrain import sharding
from bigtrain.parallel import zigzag


def dropout(x, rate, key: jax.Array | None, dims: int | None = None) -> jax.Array:
  """Zeroes with probability `rate` and scales the rest; the same bits on any mesh.

  What is zeroed is an element, or, with `dims`, all that lies at an index of the first dims. The
  first are the batch's rows: each has its own key, so that it does not matter which others are at
  hand. Without a key (evaluation) or at rate 0 it is the identity.
  """
  if key is None or (isinstance(rate, float) and rate == 0.0):
    return x
  keep = _bernoulli(key, 1.0 - rate, x, x.ndim if dims is None else dims)
  keep = jnp.expand_dims(keep, range(keep.ndim, x.ndim))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def row_keys(key: jax.Array, x) -> jax.Array:
  """A key for each row of an activation (B, ...): it follows from the row's place in the batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, sharding.row_ids(x))


def _bernoulli(key, p, x, dims: int) -> jax.Array:
  """True with probability p for each index of the first dims of `x`, whatever its layout."""
  shape, spec = x.shape[:dims], jax.typeof(x).sharding.spec.partitions[:dims]
  named, keys_B = sharding.act("") is not None, row_keys(key, x)
  if named and "context" in sharding.axes_of(spec[1:]):
    mesh = jax.sharding.get_abstract_mesh()
    one = functools.partial(zigzag.bernoulli, shape=shape[1:], shards=mesh.shape["context"])
    draw: Any = jax.sharding.auto_axes(jax.vmap(one, (0, None)), axes=mesh.explicit_axes)
    return draw(keys_B, p, out_sharding=P(*spec))
  out_sharding = P(*spec[1:]) if named else None
  draw = lambda key: jax.random.bernoulli(key, p, shape[1:], out_sharding=out_sharding)
  return jax.vmap(draw)(keys_B)
