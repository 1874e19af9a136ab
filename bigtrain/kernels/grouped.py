"""The one grouped matrix product: each row times the matrix of its group.

Dims: R row, D model, F hidden, E expert, b rows of a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigtrain.mesh import ordered, platform

BLOCK = 128  # Rows that the CPU form multiplies at once.


def grouped(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Rows that lie group by group, each times the matrix of its group: (R, F), in the dtype of `x`.

  Args:
    x_RD: the first `sizes_E[0]` rows are of group 0, the next `sizes_E[1]` of group 1, and so on.
    w_EDF: a matrix for each group.
    sizes_E: int32, which add up to R at most. What becomes of the rows behind is not defined (it
      differs by platform); they change nothing in the others, nor in any gradient but their own.

  For TPU XLA has a kernel of its own behind `ragged_dot`, forward and backward. On CPU it
  multiplies every row by every matrix: blocks of rows are as many times faster as there are groups.
  """
  return (blocked if platform() == "cpu" else jax.lax.ragged_dot)(x_RD, w_EDF, sizes_E)


def reference(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """The same from the definition, with zeros behind: every row times every matrix."""
  end_E = jnp.cumsum(sizes_E)
  row_R1 = jnp.arange(len(x_RD))[:, None]
  hit_RE = (row_R1 >= end_E - sizes_E) & (row_R1 < end_E)
  return jnp.einsum("rd,edf,re->rf", x_RD, w_EDF, hit_RE.astype(x_RD.dtype))


@jax.custom_vjp
def blocked(x_RD, w_EDF, sizes_E) -> jax.Array:
  """Block by block: a loop of as many plain products as there are blocks in use."""
  product = lambda x_bD, e: x_bD @ w_EDF[e]
  return _rows(product, w_EDF.shape[2], x_RD, sizes_E)


def _forward(x_RD, w_EDF, sizes_E):
  return blocked(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(kept, dy_RF):
  x_RD, w_EDF, sizes_E = kept
  dx_RD = _rows(lambda dy_bF, e: dy_bF @ w_EDF[e].T, x_RD.shape[1], dy_RF, sizes_E)

  def add(dw_EDF, e, row, inside_b):
    x_bD, dy_bF = (jnp.where(inside_b[:, None], _block(a, row), 0) for a in (x, dy))
    return dw_EDF.at[e].add(x_bD.T @ dy_bF)

  x, dy = _padded(x_RD), _padded(dy_RF)
  return dx_RD, _for_blocks(add, jnp.zeros_like(w_EDF), sizes_E), None


blocked.defvjp(_forward, _backward)


def _rows(product: Callable, columns: int, x_RD, sizes_E) -> jax.Array:
  """Every block by `product(x_bD, group)`, and zeros behind."""
  x = _padded(x_RD)

  def put(y_RF, e, row, inside_b):
    y_bF = jnp.where(inside_b[:, None], product(_block(x, row), e), 0)
    return jax.lax.dynamic_update_slice_in_dim(y_RF, y_bF, row, axis=0)

  return _for_blocks(put, jnp.zeros((len(x), columns), x.dtype), sizes_E)[: len(x_RD)]


def _for_blocks(step: Callable, start: jax.Array, sizes_E) -> Any:
  """`step(carry, group, first row, which of the rows are the group's)` for every block, in order.

  The last block of a group reaches into the next one, whose first block comes after it.
  """
  blocks_E = -(-sizes_E // BLOCK)
  last_E, end_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)

  def body(i, carry):
    e = jnp.searchsorted(last_E, i, side="right")
    row = (end_E - sizes_E)[e] + BLOCK * (i - (last_E - blocks_E)[e])
    return step(carry, e, row, row + jnp.arange(BLOCK) < end_E[e])

  # Inside an island the carry is typed as differing between devices, as what is put into it does.
  after = jax.eval_shape(body, 0, start)
  varying = jax.typeof(after).mat.varying - jax.typeof(start).mat.varying
  return jax.lax.fori_loop(
    0, last_E[-1], body, jax.lax.pcast(start, ordered(varying), to="varying")
  )


def _padded(x_R) -> jax.Array:
  return jnp.pad(x_R, ((0, BLOCK), (0, 0)))


def _block(x_R, row) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x_R, row, BLOCK)
