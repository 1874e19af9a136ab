"""Values that a TPU's compiler is kept from computing inside the matrix products around them.

It likes to compute a norm's or an activation's backward pass inside a product, or to add to its
result there. While the weight fits into vector memory beside what is multiplied that is free, and
saves the way through the chip's memory. Where it crowds that memory the products run in small
tiles, and what is inside is done once for every tile: of a product of 4.5 ms that made 6 to 8.
"""

import math

import jax

from bigtrain import mesh, sharding

MiB = 2**20
# Vector memory by jax's device kind, as Pallas has it; of other chips, the smaller.
MEMORY = {"TPU v5 lite": 128 * MiB, "TPU v6 lite": 128 * MiB}
SMALLER = 64 * MiB


def fence(x, w, dims: str) -> jax.Array:
  """`x` by itself, and its gradient too: what goes into a product with `w`, or comes out of one.

  It is the identity, and in force only on chips whose vector memory that weight crowds.

  Args:
    x: in the compute dtype.
    w: the stored weight.
    dims: its letters.
  """
  return jax.lax.optimization_barrier(x) if _crowds(w, dims, x.dtype) else x


def gradient_fence(x, w, dims: str) -> jax.Array:
  """As `fence`, of the gradient alone: each use of what is returned sends back one of its own."""
  return _gradient_fence(x) if _crowds(w, dims, x.dtype) else x


def _crowds(w, dims: str, dtype) -> bool:
  """Whether a gathered weight takes half of the vector memory or more."""
  if mesh.platform() != "tpu":
    return False
  parts = math.prod(map(sharding.axis_size, set(dims) - {"D", "L"}))  # These two are gathered.
  size = math.prod(w.shape) // parts * dtype.itemsize
  return 2 * size >= MEMORY.get(mesh.device_kind(), SMALLER)


@jax.custom_vjp
def _gradient_fence(x) -> jax.Array:
  return x


_gradient_fence.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))
