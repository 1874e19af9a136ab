"""A product of two arrays rounded to eight bits, forward and backward.

With scales s that divide what is rounded, y = s_x * s_w * (x_q @ w_q). Both products of the
backward pass take the same x_q and w_q, so that nothing is rounded along other dims a second time:
their scales run along dims which these products sum over, and are multiplied into the gradient
before it is rounded itself.

XLA's own arithmetic serves on every platform: int8 products are summed in int32, which is exact up
to 133,000 terms of the largest numbers on one device; float8 ones in float32. Where a chip has no
such units, the compiler widens the operands, and the values are the same.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from bigtrain import sharding
from bigtrain.marks import Low
from bigtrain.mesh import ordered
from bigtrain.products import Delayed, Products

TOP = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # Largest numbers.
# Of scales: that of a row of the tiniest gradients would be no number that has an inverse.
LEAST = 2.0**-126
FIRST = 8.0  # What delayed scaling takes the largest magnitude to be before it has seen one.


class Rounded(NamedTuple):
  """An array in eight bits: `q * scale` is nearly what was rounded."""

  q: jax.Array
  scale: jax.Array  # (), or one for each index of the dims that a product does not sum over.
  amax: jax.Array | None  # The largest magnitude that was there; None where nobody wants it.


class Plan(NamedTuple):
  """What of a product is no array."""

  c: Products
  n: int  # Dims that are summed over, the last of x and the first of w.
  y: P | None  # Where the product lies, and where its gradients do.
  dx: P | None
  dw: P | None
  dtype: Any


def rounded(form: str, x, over: tuple[int, ...] | None, amax=None) -> Rounded:
  """`x` in an eight-bit format.

  Args:
    form: a key of TOP.
    x: any float array.
    over: the dims that a scale is shared over; None for all.
    amax: the largest magnitude to scale by, (), in the place of that of `x` itself.
  """
  x = _plain(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  seen = jnp.max(jnp.abs(x), axis=over)
  if over is None:
    seen = jax.lax.pmax(seen, ordered(jax.typeof(seen).mat.varying))
  # 0: nothing was seen yet.
  limit = seen if amax is None else jnp.where(amax > 0, amax, FIRST).astype(x.dtype)
  scale = jnp.maximum(limit / TOP[form], LEAST)
  kept = () if over is None else tuple(i for i in range(x.ndim) if i not in over)
  x = x * jnp.expand_dims(1 / scale, [i for i in range(x.ndim) if i not in kept])
  if amax is not None:
    x = jnp.clip(x, -TOP[form], TOP[form])
  q = jnp.round(x).astype(jnp.int8) if form == "int8" else x.astype(form)
  # Eight bits cannot say that something was no number, and a scale from before does not.
  return Rounded(q, scale if amax is None else jnp.where(jnp.isfinite(seen), scale, seen), seen)


def weight(low: Low, dims: str, n: int, like) -> Rounded:
  """A marked parameter, rounded where it is stored and then gathered: eight bits travel.

  Args:
    low: the parameter.
    dims: its letters, of which products sum over the first `n`.
    n: see there.
    like: the same as `sharding.use` gathers it in the compute dtype.
  """
  inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
  amax = None if low.amax_3 is None else low.amax_3[1]
  summed = tuple(range(n)) if _by_channel(low.c) else None
  w = jax.lax.stop_gradient(like if inside else low[...])
  q, scale, seen = rounded(low.c.format, w, summed, amax)
  if inside:  # What island shards a weight, it has gathered: a scale is of all of it.
    return Rounded(q, scale, seen)
  scale = sharding.use(scale, dims[n:]) if scale.ndim else scale
  return Rounded(sharding.use(q, dims), scale, seen)


def product(c: Products, n: int, spec: P | None, x, like, w: Rounded, amax_3=None) -> jax.Array:
  """The product of `x` and a rounded weight, in the dtype of `x`, scaled behind its sums.

  Args:
    c: the settings.
    n: how many dims are summed over, the last of x and the first of w.
    spec: where the product lies; unreduced over axes along which parts of sums are left.
    x: the input.
    like: the weight in the compute dtype, for its gradient alone: nothing computes it.
    w: the weight.
    amax_3: delayed scaling's largest magnitudes of x, w and the gradient. What this product meets
      is returned as its gradient.
  """
  x, like = _alike(x, like)
  of_gradient = lambda a: None if spec is None else _of_gradient(jax.typeof(a).sharding.spec)
  plan = Plan(c, n, spec, of_gradient(x), of_gradient(like), x.dtype)
  return _product(plan, x, like, w, amax_3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: Plan, x, like, w: Rounded, amax_3) -> jax.Array:
  return _forward(plan, x, like, w, amax_3)[0]


def _forward(plan: Plan, x, like, w: Rounded, amax_3):
  del like
  rows = x.ndim - plan.n
  summed = tuple(range(rows, x.ndim))
  amax = None if amax_3 is None else amax_3[0]
  x = rounded(plan.c.format, x, summed if _by_channel(plan.c) else None, amax)
  sums = _dot(plan, x.q, w.q, summed, range(plan.n), plan.y)
  y = _scaled(sums, x.scale, w.scale).astype(plan.dtype)
  return y, (x, w, amax_3)


def _backward(plan: Plan, kept, g):
  x, w, amax_3 = kept
  c, rows = plan.c.gradients, x.q.ndim - plan.n
  over_rows, over_columns = tuple(range(rows)), tuple(range(rows, g.ndim))
  wide = _plain(g).astype(jnp.promote_types(g.dtype, jnp.float32))
  by_channel, seen = _by_channel(plan.c), None
  if by_channel:  # w has a scale for each column, x one for each row.
    of_dx, of_dw = wide * w.scale, wide * jnp.expand_dims(x.scale, over_columns)
    after = (1.0, 1.0)
  else:
    of_dx, of_dw, after = wide, wide, (w.scale, x.scale)
  plain = lambda a: (a.astype(plan.dtype), jnp.ones((), wide.dtype))
  if c is None:
    (gx, sx), (gw, sw) = plain(of_dx), plain(of_dw)
  elif by_channel:
    gx, sx, _ = rounded(c.format, of_dx, over_columns)
    gw, sw = rounded(c.format, of_dw, over_rows)[:2] if c.weights else plain(of_dw)
  else:
    gx, sx, seen = rounded(c.format, wide, None, None if amax_3 is None else amax_3[2])
    gw, sw = (gx, sx) if c.weights else plain(of_dw)
  inner = range(plan.n, w.q.ndim)
  sums = _dot(plan, gx, w.q, over_columns, inner, plan.dx)
  dx = _scaled(sums, sx * after[0], jnp.ones((), wide.dtype)).astype(plan.dtype)
  sums = _dot(plan, x.q, gw, over_rows, over_rows, plan.dw)
  dw = _scaled(sums, jnp.ones((), wide.dtype), sw * after[1]).astype(plan.dtype)
  if amax_3 is not None:
    assert x.amax is not None and w.amax is not None
    amax_3 = jnp.stack([x.amax, w.amax, jnp.zeros_like(x.amax) if seen is None else seen])
  return dx, dw, None, amax_3


_product.defvjp(_forward, _backward)


def _by_channel(c: Products) -> bool:
  return not isinstance(c.scaling, Delayed) and c.scaling.scales == "channel"


def _dot(plan: Plan, a, b, of_a, of_b, spec: P | None) -> jax.Array:
  """The sums over these dims; where one operand is not in eight bits, neither is the other."""
  if jnp.dtype(plan.dtype) in (a.dtype, b.dtype):
    a, b = a.astype(plan.dtype), b.astype(plan.dtype)
  wide = jnp.int32 if a.dtype == jnp.int8 else jnp.promote_types(plan.dtype, jnp.float32)
  dims = ((tuple(of_a), tuple(of_b)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=wide, out_sharding=spec)


def _scaled(sums, rows, columns) -> jax.Array:
  """Sums (rows..., columns...) times the scales of their rows and of their columns."""
  if rows.ndim:
    rows = jnp.expand_dims(rows, range(rows.ndim, sums.ndim))
  if columns.ndim:
    columns = jnp.expand_dims(columns, range(sums.ndim - columns.ndim))
  sums = sums.astype(jnp.promote_types(rows.dtype, jnp.float32))
  parts = jax.typeof(sums).sharding.spec.unreduced
  if parts:  # Parts of sums may be multiplied by what is the same wherever they lie.
    same = lambda s: jax.sharding.reshard(s, jax.typeof(s).sharding.spec.update(reduced=parts))
    rows, columns = same(rows), same(columns)
  return sums * rows * columns


def _plain(x) -> jax.Array:
  """What is typed as reduced, without that: here no gradient flows."""
  spec = jax.typeof(x).sharding.spec
  return jax.sharding.reshard(x, spec.update(reduced=frozenset())) if spec.reduced else x


def _of_gradient(spec: P) -> P:
  return spec.update(reduced=frozenset(), unreduced=spec.reduced)


def _alike(x, w) -> tuple[jax.Array, jax.Array]:
  """Both varying over the manual axes that either varies over, as the operands of a product are."""
  varying = lambda a: jax.typeof(a).mat.varying
  both = varying(x) | varying(w)
  cast = lambda a: jax.lax.pcast(a, ordered(both - varying(a)), to="varying")
  return cast(x), cast(w)
