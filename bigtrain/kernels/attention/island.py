"""Attention as an island: each device attends with the heads of its own rows.

Dims: B batch, T query position, K kv heads, G queries per kv head, H head.
"""

from collections.abc import Callable

import jax

from bigtrain import sharding

Local = Callable[..., jax.Array]


def apart(function: Local, q_BTKGH, *arrays, opaque: bool = False) -> jax.Array:
  """`function(q_BTKGH, *arrays)`, which is of the shape of `q_BTKGH`, by every device on its part.

  Without a mesh, and inside an island (those do not nest), it is called as it is.

  Args:
    function: what a device computes. Nothing is exchanged: rows and heads may be sharded, but not
      positions.
    q_BTKGH, arrays: trees of arrays, cut as their types say.
    opaque: the function does not tell over which axes its values vary, as kernels do not that other
      projects wrote. Gradients are summed over axes that do not shard an array all the same.
  """
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return function(q_BTKGH, *arrays)
  out_specs = jax.typeof(q_BTKGH).sharding.spec
  return sharding.island(function, out_specs, q_BTKGH, opaque=opaque)(q_BTKGH, *arrays)


def shards_positions(q_BTKGH) -> bool:
  """Whether the positions of these queries are spread over devices."""
  spec = jax.typeof(q_BTKGH).sharding.spec
  return len(spec) > 1 and bool(spec[1])


def tells_varying(q_BTKGH) -> bool:
  """Whether this is traced for an island in which every operation says over which axes it varies.

  Kernels that other projects wrote do not, and fail there.
  """
  return bool(jax.typeof(q_BTKGH).mat.varying)
