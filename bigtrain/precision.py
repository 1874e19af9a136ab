"""Numbers: the compute dtype, and the one function through which every weight product goes.

Parameters are float32. Activations are in the compute dtype, and a product takes the dtype of the
activation that enters it; norms, softmax and losses reduce in float32. The products of parameters
that products.py has marked are made of eight bits.
"""

import math
import re
from typing import Literal

import jax
import jax.numpy as jnp
from jax import P

from bigtrain import marks, quantized, sharding
from bigtrain.kernels.fence import gradient_fence
from bigtrain.mesh import platform

Dtype = Literal["auto", "float32", "bfloat16"]


def compute_dtype(name: Dtype) -> jnp.dtype:
  """`auto` is float32 on CPU, where bfloat16 is emulated, and bfloat16 on accelerators."""
  if name == "auto":
    name = "float32" if platform() == "cpu" else "bfloat16"
  return jnp.dtype(name)


def raised(dtype) -> jnp.dtype:
  """The dtype in which values of `dtype` are reduced: float32, or wider where they are."""
  return jnp.promote_types(dtype, jnp.float32)


def project(dims: str, x, w, bias=None) -> jax.Array:
  """A weight product, plus a bias: `project("BTD,DKGH->BTKGH", x_BTD, self.q_DKGH)`.

  `x` ends in the contracted dims and `w`, a stored parameter, begins with them; it is gathered
  here, in the dtype of `x`. The product is made on two-dimensional operands: on CPU the weight
  gradient of a (B*T, D) operand is twice as fast as that of a (B, T, D) one. Where a dim inside a
  group is sharded, the group cannot be merged without moving data, and the einsum itself serves;
  also on TPU, where a merged product would be copied into the order that attention takes.
  """
  x_dims, w_dims, out = re.split(",|->", dims)
  n = sum(d in w_dims for d in x_dims)
  rows, inner, columns = x_dims[:-n], w_dims[:n], w_dims[n:]
  assert x_dims[-n:] == inner and rows + columns == out, dims
  x = gradient_fence(x, w, w_dims)
  low, over = marks.low_of(w), sharding.split_over(x, len(rows))
  w = sharding.use(w, w_dims, x.dtype, over)
  eight = None if low is None else quantized.weight(low, w_dims, n, w)
  shape = (*x.shape[:-n], *w.shape[n:])
  merges = sharding.mergeable(rows, inner) and sharding.mergeable(rows, columns)
  if merges := merges and platform() != "tpu":
    x, w = _matrix(x, rows, inner), _matrix(w, inner, columns)
    if eight is not None:
      scale_M = _vector(eight.scale, columns)
      eight = eight._replace(q=_matrix(eight.q, inner, columns), scale=scale_M)
    n, spec = 1, sharding.merged(rows, columns)
  else:
    spec = sharding.before_sum(out, inner)
  if low is None or eight is None:
    y = jnp.tensordot(x, w, n, out_sharding=spec)
  else:
    y = quantized.product(low.c, n, spec, x, w, eight, low.amax_3)
  if merges:
    y = jnp.reshape(y, shape, out_sharding=sharding.act(out))
  else:
    y = sharding.scattered(y, out)
  return y if bias is None else _plus(y, bias[...].astype(y.dtype), rows, columns)


def _plus(y, bias, rows: str, columns: str) -> jax.Array:
  """A product of these dims and its bias, which has the columns alone."""
  if platform() != "tpu":
    return y + bias
  # As the weight of an input that is always 1, so that its gradient is a product too, summed in
  # float32: to add up rows took the vector units longer than the weight's own gradient takes.
  spec = sharding.act(rows + columns)
  of_rows = spec and P(*spec[: len(rows)], None)
  ones = jnp.ones((*y.shape[: len(rows)], 1), y.dtype, out_sharding=of_rows)
  ones = jax.lax.optimization_barrier(ones)  # Else XLA sees through it, and adds up rows again.
  bias = sharding.gathered(bias[None], (), sharding.split_over(y, len(rows)))
  return y + jnp.tensordot(ones, bias, 1, out_sharding=spec)


def _matrix(a, rows: str, columns: str) -> jax.Array:
  shape = (math.prod(a.shape[: len(rows)]), math.prod(a.shape[len(rows) :]))
  spec = sharding.merged(rows, columns)
  if spec is not None:  # What `shared` marked stays so.
    spec = spec.update(reduced=jax.typeof(a).sharding.spec.reduced)
  return jnp.reshape(a, shape, out_sharding=spec)


def _vector(a, dims: str) -> jax.Array:
  """One dim of all; a scalar stays one."""
  return jnp.reshape(a, -1, out_sharding=sharding.merged(dims)) if a.ndim else a
