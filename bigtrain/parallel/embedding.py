"""Rows of a table whose vocabulary is spread over devices.

Dims: B batch, T position, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from bigtrain import sharding


def rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """The rows of these ids, (B, T, D).

  Each device looks up what it has of the table, and these parts are summed: over `tensor` by one
  all-reduce, over `sequence`, which wants parts of the row, by one reduce-scatter.
  """
  out = sharding.act("BTD")
  if not (split := sharding.split_over(table_VD, 1)):
    return table_VD.at[ids_BT].get(out_sharding=out)
  (axis,) = split
  specs = jax.typeof(table_VD).sharding.spec, jax.typeof(ids_BT).sharding.spec
  local = functools.partial(_local, axis=axis, scatter=axis in sharding.axes_of(out))
  return jax.shard_map(local, in_specs=specs, out_specs=out)(table_VD, ids_BT)


def _local(table_VD, ids_BT, *, axis: str, scatter: bool) -> jax.Array:
  at_BT = ids_BT - len(table_VD) * jax.lax.axis_index(axis)
  here_BT = (at_BT >= 0) & (at_BT < len(table_VD))
  x_BTD = jnp.where(here_BT[..., None], table_VD.at[at_BT].get(mode="clip"), 0)
  if scatter:
    return jax.lax.psum_scatter(x_BTD, axis, scatter_dimension=1, tiled=True)
  return jax.lax.psum(x_BTD, axis)
