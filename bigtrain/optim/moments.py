"""What an optimizer remembers of each parameter, kept in 16 or 8 bits between updates.

Around any direction: its state is widened to float32 before an update and rounded behind it, at
random and right in the mean. Rounding to the nearest would not do: a mean that decays by 0.999
moves by less than half a step of bfloat16, and would stay where it is.

Eight bits are a code of equal ratios with one scale for each row along the last dim, in the place
of the dynamic code and the blocks of 2,048 of arXiv:2110.02861: it needs no table, its relative
error is the same for small and large values, so that rows may be long and one large value spoils
none of the others, and nothing has to be cut to fit the shards of a mesh.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigtrain import rounding
from bigtrain.config import Refused

Moments = Literal["float32", "bfloat16", "int8"]
# Names under which directions keep means of squares, which have no sign: all codes are for sizes.
SQUARES = ("nu", "square", "sum_of_squares")
RANGE = {False: 24, True: 16}  # Powers of two from the smallest code to the largest; signed or not.
LEVELS = {False: 255, True: 127}  # Codes above 0.


class Coded(NamedTuple):
  """An array in eight bits. Code 0 is 0, code LEVELS the row's largest magnitude."""

  code: jax.Array  # uint8, or int8 with the sign.
  scale: jax.Array  # Of each row: the largest magnitude; float32, the last dim 1.


class Kept(NamedTuple):
  """The state of `kept`."""

  count: jax.Array  # Updates seen.
  state: Any  # Of the direction, what is shaped like a parameter being narrow.


def kept(moments: Moments, direction: optax.GradientTransformation) -> optax.GradientTransformation:
  """`direction`, with what it remembers of matrices and vectors kept in that format.

  Narrow is every float32 array of its state that lies under a parameter's path and has its shape.
  What has another (statistics of rows and columns, eigenvectors) stays as it is.

  Raises:
    Refused: when it meets parameters, if nothing is narrow.
  """
  if moments == "float32":
    return direction

  def narrow(state, params, count):
    shapes = [(jax.tree_util.keystr(p), w.shape) for p, w in jax.tree.leaves_with_path(params)]
    key, number, found = jax.random.fold_in(jax.random.key(0), count), iter(range(10**9)), []

    def one(path, x):
      name = jax.tree_util.keystr(path)
      if not any(x.shape == shape and name.endswith(end) for end, shape in shapes) or not x.ndim:
        return x
      found.append(name)
      own = jax.random.fold_in(key, next(number))
      if moments == "bfloat16":
        return rounding.to_bfloat16(x, own)
      signed = not any(getattr(step, "name", None) in SQUARES for step in path)
      return encode(x, own, signed=signed)

    state = jax.tree_util.tree_map_with_path(one, state)
    if not found:
      raise Refused(f"moments is {moments}, but this optimizer keeps none; set it to float32")
    return Kept(count, state)

  def init(params) -> Kept:
    return narrow(direction.init(params), params, jnp.zeros((), jnp.int32))

  def update(updates, state: Any, params: Any = None):
    wide = jax.tree.map(_widened, state.state, is_leaf=lambda x: isinstance(x, Coded))
    found, after = direction.update(updates, wide, params)
    return found, narrow(after, updates if params is None else params, state.count + 1)

  return optax.GradientTransformation(init, update)


def _widened(x):
  if isinstance(x, Coded):
    return decode(x)
  return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def encode(x: jax.Array, key: jax.Array, *, signed: bool) -> Coded:
  """float32 rounded at random to one of the two nearest codes, so that it is right in the mean.

  Sizes below the smallest code become 0 or that, in the mean right, where there are signs. A mean
  of squares becomes that itself: it is divided by, and 0 would make an update of any size.
  """
  scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  size = jnp.abs(x) / jnp.where(scale > 0, scale, 1)
  top, per_level = LEVELS[signed], RANGE[signed] / (LEVELS[signed] - 1)
  level = jnp.floor(top + jnp.log2(jnp.maximum(size, 2.0**-126)) / per_level)
  below = jnp.clip(level, 0 if signed else 1, top - 1)
  low, high = _size(below, signed), _size(below + 1, signed)
  up = size - low > rounding.uniform(x, key) * (high - low)
  code = jnp.where(size > 0, below + up, 0)
  code = (jnp.sign(x) * code).astype(jnp.int8) if signed else code.astype(jnp.uint8)
  return Coded(code, scale)


def decode(c: Coded) -> jax.Array:
  """The float32 array that codes stand for."""
  signed = c.code.dtype == jnp.int8
  code = c.code.astype(jnp.float32)
  return jnp.sign(code) * _size(jnp.abs(code), signed) * c.scale


def _size(code, signed: bool) -> jax.Array:
  """What a code above 0 stands for, in units of the row's largest magnitude."""
  ratio = RANGE[signed] / (LEVELS[signed] - 1)
  return jnp.where(code > 0, jnp.exp2((code - LEVELS[signed]) * ratio), 0.0)
