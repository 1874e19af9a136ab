"""Attention to some of the keys, in memory that does not grow with their number.

What several such parts found is put together by the logarithm of the sum of their exponentials
(arXiv:2205.14135), by which the backward pass goes part by part too. A block of
scores of which the mask shows nothing is not computed.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head, N block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bigtrain.kernels.attention import Form, Tokens, visible
from bigtrain.kernels.attention.plain import MASKED
from bigtrain.mesh import ordered
from bigtrain.precision import raised

BLOCK = 512  # Queries, and keys, of a block of scores at most.


class Queries(NamedTuple):
  q_BTKGH: jax.Array  # Scaled.
  tokens: Tokens


class Keys(NamedTuple):
  k_BSKH: jax.Array
  v_BSKH: jax.Array
  tokens: Tokens


class Found(NamedTuple):
  """What queries found among some keys, both in float32."""

  out_BTKGH: jax.Array  # Normalised over these keys; 0 where none is seen.
  lse_BTKG: jax.Array  # Of their scores; `MASKED` where none is seen.


class Sent(NamedTuple):
  """What the backward pass sends to queries, about all keys that they have seen."""

  dout_BTKGH: jax.Array  # The gradient of the output.
  lse_BTKG: jax.Array  # Of all scores.
  sum_BTKG: jax.Array  # `(dout * out).sum(-1)`.


def nothing(q_BTKGH) -> Found:
  """Found among no keys."""
  full = lambda shape, value: like(q_BTKGH, jnp.full(shape, value, raised(q_BTKGH.dtype)))
  return Found(full(q_BTKGH.shape, 0), full(q_BTKGH.shape[:-1], MASKED))


def merged(a: Found, b: Found) -> Found:
  """Found among the keys of both."""
  lse_BTKG = jnp.logaddexp(a.lse_BTKG, b.lse_BTKG)
  share = lambda x: jnp.exp(x.lse_BTKG - lse_BTKG)[..., None] * x.out_BTKGH
  return Found(share(a) + share(b), lse_BTKG)


def partial_attention(queries: Queries, keys: Keys, form: Form) -> Found:
  """Softmax attention to these keys, besides which there may be others elsewhere."""

  def of_queries(queries: Queries) -> Found:
    def add(found: Found, keys: Keys):
      mask_BTS = visible(queries.tokens, keys.tokens, form)

      def look() -> Found:
        score_BKGTS, _ = _scores(queries, keys, form)
        score_BKGTS = jnp.where(_wide(mask_BTS), score_BKGTS, MASKED)
        high_BKGT1 = score_BKGTS.max(-1, keepdims=True)
        p_BKGTS = jnp.where(_wide(mask_BTS), jnp.exp(score_BKGTS - high_BKGT1), 0)
        total_BKGT1 = jnp.maximum(p_BKGTS.sum(-1, keepdims=True), 1e-30)
        p_BKGTS = (p_BKGTS / total_BKGT1).astype(keys.v_BSKH.dtype)
        lse_BKGT1 = high_BKGT1 + jnp.log(total_BKGT1)
        out_BTKGH = _product("bkgts,bskh->btkgh", p_BKGTS, keys.v_BSKH)
        return merged(found, Found(out_BTKGH, jnp.moveaxis(lse_BKGT1[..., 0], 3, 1)))

      return _if_seen(mask_BTS, look, found), None

    return jax.lax.scan(add, nothing(queries.q_BTKGH), _blocks(keys))[0]

  return _whole(jax.lax.map(of_queries, _blocks(queries)), queries.q_BTKGH.shape[1])


def partial_gradients(
  queries: Queries, keys: Keys, form: Form, sent: Sent
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What these queries and keys add to the gradients of q, k and v, in float32."""
  wide = raised(queries.q_BTKGH.dtype)
  blocks = _blocks((queries, sent))

  def of_keys(dq_NBTKGH, keys: Keys):
    def add(dkv, block):
      dq_BTKGH, (queries, sent) = block
      mask_BTS = visible(queries.tokens, keys.tokens, form)

      def look():
        by_score = lambda x_BTKG: jnp.moveaxis(x_BTKG, 1, 3)[..., None]
        score_BKGTS, slope_BKGTS = _scores(queries, keys, form)
        p_BKGTS = jnp.exp(score_BKGTS - by_score(sent.lse_BTKG))
        p_BKGTS = jnp.where(_wide(mask_BTS), p_BKGTS, 0)
        dp_BKGTS = _product("btkgh,bskh->bkgts", sent.dout_BTKGH, keys.v_BSKH)
        dscore_BKGTS = p_BKGTS * (dp_BKGTS - by_score(sent.sum_BTKG)) * slope_BKGTS
        dscore_BKGTS = dscore_BKGTS.astype(queries.q_BTKGH.dtype)
        p_BKGTS = p_BKGTS.astype(sent.dout_BTKGH.dtype)
        return (
          dq_BTKGH + _product("bkgts,bskh->btkgh", dscore_BKGTS, keys.k_BSKH),
          dkv[0] + _product("bkgts,btkgh->bskh", dscore_BKGTS, queries.q_BTKGH),
          dkv[1] + _product("bkgts,btkgh->bskh", p_BKGTS, sent.dout_BTKGH),
        )

      dq_BTKGH, *dkv = _if_seen(mask_BTS, look, (dq_BTKGH, *dkv))
      return tuple(dkv), dq_BTKGH

    zeros = (like(keys.k_BSKH, jnp.zeros(keys.k_BSKH.shape, wide)),) * 2
    dkv, dq_NBTKGH = jax.lax.scan(add, zeros, (dq_NBTKGH, blocks))
    return dq_NBTKGH, dkv

  zeros = like(queries.q_BTKGH, jnp.zeros(queries.q_BTKGH.shape, wide))
  dq_NBTKGH, dkv = jax.lax.scan(of_keys, _blocks(zeros), _blocks(keys))
  T, S = queries.q_BTKGH.shape[1], keys.k_BSKH.shape[1]
  return _whole(dq_NBTKGH, T), *_whole(dkv, S)


def like(x, value) -> jax.Array:
  """A constant, as different from device to device as `x` may be: for loops inside islands."""
  return jax.lax.pcast(value, ordered(jax.typeof(x).mat.varying), to="varying")


def _scores(queries: Queries, keys: Keys, form: Form):
  """Scores, and their slope by the product that they are made of, (B, K, G, T, S)."""
  score_BKGTS = _product("btkgh,bskh->bkgts", queries.q_BTKGH, keys.k_BSKH)
  if form.softcap is None:
    return score_BKGTS, 1.0
  squashed_BKGTS = jnp.tanh(score_BKGTS / form.softcap)
  return form.softcap * squashed_BKGTS, 1 - squashed_BKGTS**2


def _if_seen(mask_BTS, look, otherwise):
  """`look()` if the mask shows anything, else what there is already."""
  return jax.lax.cond(mask_BTS.any(), look, lambda: otherwise)


def _wide(mask_BTS) -> jax.Array:
  return mask_BTS[:, None, None]


def _product(dims: str, a, b) -> jax.Array:
  return jnp.einsum(dims, a, b, preferred_element_type=raised(a.dtype))


def _blocks(tree):
  """(B, T, ...) -> (blocks, B, N, ...), as few blocks as there can be, of one size.

  Where they are longer than T together, as where T is prime, the last ends in slots that are empty,
  which see nothing and are not seen.
  """

  def split(x_BT, empty=0):
    B, T, *rest = x_BT.shape
    blocks = -(-T // BLOCK)
    size = -(-T // blocks)
    fill = [(0, 0), (0, blocks * size - T), *[(0, 0)] * len(rest)]
    x_BT = jnp.pad(x_BT, fill, constant_values=empty)
    return jnp.swapaxes(x_BT.reshape(B, blocks, size, *rest), 0, 1)

  def of(leaf):
    if not isinstance(leaf, Tokens):
      return split(leaf)
    return Tokens(split(leaf.positions, -1), jax.tree.map(split, leaf.segments))

  return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Tokens))


def _whole(tree, length: int):
  """The inverse of `_blocks`."""

  def join(x_NBT):
    N, B, T = x_NBT.shape[:3]
    return jnp.swapaxes(x_NBT, 0, 1).reshape(B, N * T, *x_NBT.shape[3:])[:, :length]

  return jax.tree.map(join, tree)
