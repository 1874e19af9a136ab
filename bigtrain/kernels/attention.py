"""The one attention function: grouped queries, packed documents, windows, soft caps and biases.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all G*T of
them, H head, P distance: of a query and a key, T + S - 1 of them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bigtrain import sharding, taps
from bigtrain.precision import raised

MASKED = -1e30  # Finite, so that a row that may see nothing (padding) has no NaN.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where the tokens of a row stand: all that a mask or a rotation needs to know about them."""

  positions: jax.Array  # (B, T) int32: from 0 within each document; negative for an empty slot.
  segments: jax.Array | None = None  # (B, T) int32: the document in the row; None where all is one.


class Form(NamedTuple):
  """Which keys of its document a query sees, and what becomes of a score."""

  causal: bool  # It sees itself and what is before it.
  window: int | None = None  # Positions seen, itself included; None for all.
  softcap: float | None = None  # Scores are squashed to c * tanh(score / c) (arXiv:2408.00118).


def visible(query: Tokens, key: Tokens, form: Form) -> jax.Array:
  """Which keys each query attends to, (B, T, S) bool: of its own document, by the form."""
  distance_BTS = query.positions[:, :, None] - key.positions[:, None, :]
  mask_BTS = jnp.broadcast_to(key.positions[:, None, :] >= 0, distance_BTS.shape)
  if form.causal:
    mask_BTS &= distance_BTS >= 0
  if form.window is not None:
    mask_BTS &= jnp.abs(distance_BTS) < form.window
  if query.segments is not None and key.segments is not None:
    mask_BTS &= query.segments[:, :, None] == key.segments[:, None, :]
  return mask_BTS


def attend(
  q_BTKGH,
  k_BSKH,
  v_BSKH,
  queries: Tokens,
  keys: Tokens,
  form: Form,
  *,
  bias_KGP=None,
  dropout=0.0,
  key=None,
) -> jax.Array:
  """Softmax attention; scores and softmax in float32. Returns (B, T, K, G, H) in the dtype of `v`.

  Queries come scaled. `bias_KGP` is added by distance, after a soft cap: entry p to the score of
  column s for the query in column t = s - p + T - 1. It is a vector for each head, so that a kernel
  that goes through the scores block by block needs no array of their size.

  Heads move in front of positions first, and the queries that share a kv head become one dim:
  batched products of plain matrices are nearly three times as fast on CPU, the softmax's gradient
  four times, and it is free elsewhere.
  """
  if sharding.rows_are_cut():
    from bigtrain.parallel import context  # Which calls this in turn.

    extras = {"bias_KGP": bias_KGP, "dropout": dropout, "key": key}
    return context.attend(q_BTKGH, k_BSKH, v_BSKH, queries, keys, form, **extras)
  B, T, K, G, H = q_BTKGH.shape
  # Reshaping says its sharding: that of a dim of size 1 would be lost.
  shaped = lambda x, dims, shape: jnp.reshape(x, shape, out_sharding=sharding.act(dims))
  q_BKGTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))
  q_BKNH = shaped(q_BKGTH, "BKNH", (B, K, G * T, H))
  mask_BTS = visible(queries, keys, form)
  k_BKSH, v_BKSH = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSKH, v_BSKH))
  mask_BGTS = jnp.broadcast_to(mask_BTS[:, None], (B, G, *mask_BTS.shape[1:]))
  mask_BNS = shaped(mask_BGTS, "BNS", (B, G * T, mask_BTS.shape[-1]))
  score_BKNS = jnp.einsum(
    "bknh,bksh->bkns", q_BKNH, k_BKSH, preferred_element_type=raised(q_BKNH.dtype)
  )
  if (cap := form.softcap) is not None:
    score_BKNS = cap * jnp.tanh(score_BKNS / cap)
  if bias_KGP is not None:
    score_BKNS += shaped(by_column(bias_KGP, T), "KNS", score_BKNS.shape[1:])
  score_BKNS = jnp.where(mask_BNS[:, None], score_BKNS, MASKED)
  prob_BKNS = jax.nn.softmax(score_BKNS).astype(v_BSKH.dtype)
  taps.tap("score_max", jnp.max, score_BKNS)
  taps.tap("entropy", _entropy, prob_BKNS, mask_BNS)
  prob_BKNS = sharding.dropout(prob_BKNS, dropout, key)
  out_BKNH = jnp.einsum("bkns,bksh->bknh", prob_BKNS, v_BKSH)
  out_BKGTH = shaped(out_BKNH, "BKGTH", (B, K, G, T, H))
  return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4))


def by_column(bias_KGP, T: int) -> jax.Array:
  """A bias by distance for each of T queries and each key, (K, G, T, S).

  Row t is the vector from p = T - 1 - t on. Laid end to end with one more entry each, the T copies
  of it begin one column later in every row of the old length: all is copying, and no index is
  looked up, whose gradient would be a scatter.
  """
  K, G, P = bias_KGP.shape
  shaped = lambda x, dims, shape: jnp.reshape(x, shape, out_sharding=sharding.act(dims))
  copies_KGTP = jnp.broadcast_to(bias_KGP[:, :, None], (K, G, T, P))
  copies_KGTP = jnp.pad(copies_KGTP, ((0, 0), (0, 0), (0, 0), (0, 1)))
  line_KGN = shaped(copies_KGTP, "KGN", (K, G, T * (P + 1)))[..., : T * P]
  return shaped(line_KGN, "KGTP", (K, G, T, P))[..., T - 1 :]


def _entropy(prob_BKNS, mask_BNS) -> jax.Array:
  """The mean entropy of the weights, in nats, over the queries that see anything."""
  p_BKNS = prob_BKNS.astype(jnp.float32)
  entropy_BKN = -jnp.sum(p_BKNS * jnp.log(jnp.maximum(p_BKNS, 1e-30)), -1)
  sees_BN = jnp.any(mask_BNS, -1)
  return (entropy_BKN.mean(1) * sees_BN).sum() / jnp.maximum(sees_BN.sum(), 1)
