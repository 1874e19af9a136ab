"""Rows of a table that is spread over devices.

Dims: B batch, T position, D model, V vocabulary, n devices that share a row, d part of a row.
"""

import functools
import math

import jax
import jax.numpy as jnp

from bigtrain import sharding
from bigtrain.mesh import AXES

# Elements of a row's part from which on it is worth looking up by itself: a TPU's vector. In
# narrower ones each look-up moves more than it brings.
WIDE = 128


def rows(table_VD: jax.Array, ids_BT: jax.Array, dtype) -> jax.Array:
  """The rows of these ids, (B, T, D) in `dtype`.

  Devices either gather the table, or exchange what is looked up: each finds its part of the rows
  that all of them ask for, and an all-to-all brings the parts of a row together. That is less to
  send where a device has fewer tokens than rows of the table (its part of them, where the
  vocabulary is split). Its gradient then comes back by token too, and is added up in the table's
  own dtype.

  Where the vocabulary is split each device looks up what it has of it, and these parts are summed:
  over `tensor` by one all-reduce, over `sequence`, which wants parts of the row, by one
  reduce-scatter.

  Args:
    table_VD: the stored table, as sharding.WEIGHT lays it.
    ids_BT: int32 below V, laid as the result where V is whole.
    dtype: the compute dtype.
  """
  out = sharding.act("BTD")
  if out is None:
    return table_VD.astype(dtype).at[ids_BT].get()
  if not (over := _exchanged_over(table_VD, ids_BT)):
    table_VD = sharding.use(table_VD, "VD", dtype, over=sharding.split_over(ids_BT))
    if not sharding.split_over(table_VD, 1):
      return table_VD.at[ids_BT].get(out_sharding=out)
  specs = jax.typeof(table_VD).sharding.spec, jax.typeof(ids_BT).sharding.spec
  scattered = sharding.axes_of(out) - sharding.axes_of(specs[1])
  local = functools.partial(_local, dtype=dtype, over=over, scattered=scattered)
  return jax.shard_map(local, in_specs=specs, out_specs=out)(table_VD, ids_BT)


def _exchanged_over(table_VD, ids_BT) -> tuple[str, ...]:
  """The axes along which rows are exchanged, the slowest first; none where the table travels."""
  parts = sharding.split_over(table_VD) - sharding.split_over(table_VD, 1)
  if not parts or not parts <= sharding.split_over(ids_BT):
    return ()
  place = jax.typeof(table_VD).sharding
  length, width = place.shard_shape(table_VD.shape)
  tokens = math.prod(jax.typeof(ids_BT).sharding.shard_shape(ids_BT.shape))
  less = width >= WIDE and tokens < length
  return tuple(axis for axis in AXES if axis in parts) if less else ()


def _local(table_Vd, ids_BT, *, dtype, over: tuple[str, ...], scattered) -> jax.Array:
  """A device's rows, of what it and the others along `over` have of the table."""
  (split,) = jax.typeof(table_Vd).mat.varying - {*over} or (None,)
  n, (B, T) = math.prod(map(jax.lax.axis_size, over)), ids_BT.shape
  ids_BT = jax.lax.all_gather(ids_BT, over, axis=0, tiled=True) if over else ids_BT
  # One by one, so that gradients are summed over the slowest of the other axes last.
  for axis in filter((jax.typeof(ids_BT).mat.varying - {*over}).__contains__, AXES):
    if axis not in jax.typeof(table_Vd).mat.varying | jax.typeof(table_Vd).mat.reduced:
      table_Vd = jax.lax.pcast(table_Vd, axis, to="varying")
  if split is None:
    x_BTd = table_Vd.at[ids_BT].get(mode="clip")
  else:
    at_BT = ids_BT - len(table_Vd) * jax.lax.axis_index(split)
    here_BT = (at_BT >= 0) & (at_BT < len(table_Vd))
    x_BTd = jnp.where(here_BT[..., None], table_Vd.at[at_BT].get(mode="clip"), 0)
  x_BTD = x_BTd.astype(dtype)
  if over:
    x_nBTd = x_BTD.reshape(n, B, T, -1)
    x_BTD = jax.lax.all_to_all(x_nBTd, over, 0, 3, tiled=True).reshape(B, T, -1)
  if split is None:
    return x_BTD
  if split in scattered:
    return jax.lax.psum_scatter(x_BTD, split, scatter_dimension=1, tiled=True)
  return jax.lax.psum(x_BTD, split)
