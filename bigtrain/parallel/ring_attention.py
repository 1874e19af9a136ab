"""Ring attention (arXiv:2310.01889): keys and values go round, queries stay where they are.

Inside an island, each device has the positions that `zigzag.columns` gives it: a low piece of the
row and a high one. Under a causal mask a high query sees every low key; and of the pieces that an
earlier device holds the low query sees the low one, of a later device's the high query the high
one. So a step is the same work for all: two pairs of pieces (zig-zag, arXiv:2311.09431).

The backward pass is written by hand: keys and values go round once more and their gradients with
them, and nothing is kept but the output and the logarithm of the sum that it was divided by.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigtrain.kernels.attention import Form, Tokens
from bigtrain.parallel.blockwise import (
  Keys,
  Queries,
  Sent,
  like,
  merged,
  nothing,
  partial_attention,
  partial_gradients,
)
from bigtrain.precision import raised

AXIS = "context"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(form: Form, q_BTKGH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens) -> jax.Array:
  """Softmax attention to the keys of all devices along `context`; (B, T, K, G, H)."""
  return _forward(form, q_BTKGH, k_BSKH, v_BSKH, queries, keys)[0]


def _forward(form: Form, q_BTKGH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens):
  def meet(own: Queries, found, there: Keys, _):
    return merged(found, partial_attention(own, there, form)), ()

  # Tokens are those of every layer. Without the barrier a scan over layers would make all masks
  # before it begins, and keep them: (T / n)^2 of them.
  q_BTKGH, queries, keys = jax.lax.optimization_barrier((q_BTKGH, queries, keys))
  own, there = Queries(q_BTKGH, queries), Keys(k_BSKH, v_BSKH, keys)
  found, _ = _round(meet, form.causal, own, nothing(q_BTKGH), there, ())
  out_BTKGH = checkpoint_name(found.out_BTKGH.astype(v_BSKH.dtype), "attention")
  lse_BTKG = checkpoint_name(found.lse_BTKG, "attention")
  return out_BTKGH, (own, there, out_BTKGH, lse_BTKG)


def _backward(form: Form, kept, dout_BTKGH):
  own, there, out_BTKGH, lse_BTKG = kept
  wide = raised(dout_BTKGH.dtype)

  def meet(own: tuple[Queries, Sent], dq_BTKGH, there: Keys, dkv):
    queries, sent = own
    more_q, *more_kv = partial_gradients(queries, there, form, sent)
    return dq_BTKGH + more_q, jax.tree.map(jnp.add, dkv, tuple(more_kv))

  sum_BTKG = (dout_BTKGH.astype(wide) * out_BTKGH).sum(-1)
  sent = Sent(dout_BTKGH, lse_BTKG, sum_BTKG)
  zeros = lambda x: like(x, jnp.zeros(x.shape, wide))
  dkv = (zeros(there.k_BSKH), zeros(there.v_BSKH))
  dq, (dk, dv) = _round(meet, form.causal, (own, sent), zeros(own.q_BTKGH), there, dkv)
  dtype = own.q_BTKGH.dtype
  return dq.astype(dtype), dk.astype(dtype), dv.astype(there.v_BSKH.dtype), None, None


ring_attention.defvjp(_forward, _backward)


def _round(meet: Callable, causal: bool, own: Any, found: Any, there: Any, sums: Any):
  """Lets what is `there` on each device visit all others, and meet what is their `own`.

  `meet(own, found, there, sums)` returns what is found for the one and summed for the other, which
  go along with them. All are trees of arrays (B, positions, ...).

  Returns:
    What is found in the end, and the sums, each back on its device.
  """
  n, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
  pass_on = functools.partial(
    jax.lax.ppermute, axis_name=AXIS, perm=[(i, (i + 1) % n) for i in range(n)]
  )

  def visit(step, found, there, sums):
    """All that can see each other of here and of device `me - step`."""
    if not causal:
      return meet(own, found, there, sums)
    own_, found_, there_, sums_ = map(_pieces, (own, found, there, sums))
    found_[1], sums_[0] = meet(own_[1], found_[1], there_[0], sums_[0])
    earlier = step <= me
    pair = (_pick(earlier, *x) for x in (own_, found_, there_, sums_))
    new_found, new_sums = meet(*pair)
    return _put(earlier, found_, new_found), _put(earlier, sums_, new_sums)

  def step(carry, i):
    found, there, sums = carry
    after = pass_on(there)  # While they are looked at here.
    found, sums = visit(i, found, there, sums)
    return (found, after, pass_on(sums)), None

  if causal:  # The pair of pieces that only a device itself has: of its high ones.
    own_, found_, there_, sums_ = map(_pieces, (own, found, there, sums))
    found_[1], sums_[1] = meet(own_[1], found_[1], there_[1], sums_[1])
    found, sums = _joined(found_), _joined(sums_)
  (found, there, sums), _ = jax.lax.scan(step, (found, there, sums), jnp.arange(n - 1))
  found, sums = visit(n - 1, found, there, sums)
  return found, pass_on(sums)


def _pieces(tree) -> list:
  """[low, high]"""
  halves = [jnp.split(x, 2, axis=1) for x in jax.tree.leaves(tree)]
  structure = jax.tree.structure(tree)
  return [jax.tree.unflatten(structure, [half[i] for half in halves]) for i in (0, 1)]


def _joined(pieces: list):
  return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), *pieces)


def _pick(first, a, b):
  return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def _put(low, pieces: list, new):
  """The pieces joined, with a new one in the place of the low one or of the high one."""
  return _joined([_pick(low, new, pieces[0]), _pick(low, pieces[1], new)])
