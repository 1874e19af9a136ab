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


def misplaced(q_BTKGH, *, opaque: bool = False) -> str | None:
  """Why `apart` cannot serve queries that lie like these, if it cannot; `opaque` as there."""
  spec, varying = jax.typeof(q_BTKGH).sharding.spec, jax.typeof(q_BTKGH).mat.varying
  if len(spec) > 1 and spec[1]:
    return "positions are spread over devices"
  if opaque and varying:  # There every operation says over which axes it varies.
    return "an island around it checks over which axes values vary"
  return None
