"""The one attention function: grouped queries, packed documents, windows and soft caps.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bigtrain import sharding

MASKED = -1e30  # Finite, so that a row that may see nothing (padding) has no NaN.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where the tokens of a row stand: all that a mask or a rotation needs to know about them."""

  positions: jax.Array  # (B, T) int32: from 0 within each document; negative for an empty slot.
  segments: jax.Array | None = None  # (B, T) int32: the document in the row; None where all is one.


def visible(query: Tokens, key: Tokens, *, causal: bool, window: int | None) -> jax.Array:
  """Which keys each query attends to, (B, T, S) bool: its own document, itself and before."""
  distance_BTS = query.positions[:, :, None] - key.positions[:, None, :]
  mask_BTS = jnp.broadcast_to(key.positions[:, None, :] >= 0, distance_BTS.shape)
  if causal:
    mask_BTS &= distance_BTS >= 0
  if window is not None:
    mask_BTS &= jnp.abs(distance_BTS) < window
  if query.segments is not None and key.segments is not None:
    mask_BTS &= query.segments[:, :, None] == key.segments[:, None, :]
  return mask_BTS


def attend(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, *, softcap=None, dropout=0.0, key=None) -> jax.Array:
  """Softmax attention; scores and softmax in float32. Returns (B, T, K, G, H) in the dtype of `v`.

  Scores are scaled by H**-0.5 and, with `softcap` c, squashed to c * tanh(score / c) (Gemma 2,
  arXiv:2408.00118). Heads move in front of positions first: batched products of (T, H) matrices are
  nearly three times as fast on CPU, and free elsewhere.
  """
  q_BKGTH = jnp.transpose(q_BTKGH * q_BTKGH.shape[-1] ** -0.5, (0, 2, 3, 1, 4))
  k_BKSH, v_BKSH = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSKH, v_BSKH))
  score_BKGTS = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
  if softcap is not None:
    score_BKGTS = softcap * jnp.tanh(score_BKGTS / softcap)
  score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS, MASKED)
  prob_BKGTS = jax.nn.softmax(score_BKGTS).astype(v_BSKH.dtype)
  prob_BKGTS = sharding.dropout(prob_BKGTS, dropout, key)
  out_BKGTH = jnp.einsum("bkgts,bksh->bkgth", prob_BKGTS, v_BKSH)
  return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4))
