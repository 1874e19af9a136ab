"""Attention as it is written down: the scores of all pairs, then their softmax.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all G*T of
them, H head, P distance: of a query and a key, T + S - 1 of them.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigtrain import sharding
from bigtrain.dropout import dropout
from bigtrain.kernels.attention.call import Call, Form, visible
from bigtrain.precision import raised

MASKED = -1e30  # Finite, so that a row that may see nothing (padding) has no NaN.


def limit(form: Form, dropout: float) -> str | None:
  """Why this kernel cannot compute such a form, if it cannot."""


def unfit(call: Call) -> str | None:
  """Why this kernel cannot answer this call, if it cannot."""


def attend(call: Call) -> jax.Array:
  """See `bigtrain.kernels.attention.attend`. A query that sees nothing gets the mean of all values.

  Heads move in front of positions first, and the queries that share a kv head become one dim:
  batched products of plain matrices are nearly three times as fast on CPU, the softmax's gradient
  four times, and it is free elsewhere.
  """
  v_BSKH, G, T = call.v_BSKH, call.q_BTKGH.shape[3], call.q_BTKGH.shape[1]
  score_BKNS, mask_BNS = scores(call)
  score_BKNS = jnp.where(mask_BNS[:, None], score_BKNS, MASKED)
  prob_BKNS = jax.nn.softmax(score_BKNS).astype(v_BSKH.dtype)
  prob_BKNS = dropout(prob_BKNS, call.dropout, call.key)
  v_BKSH = jnp.transpose(v_BSKH, (0, 2, 1, 3))
  out_BKNH = jnp.einsum("bkns,bksh->bknh", prob_BKNS, v_BKSH)
  B, K, _, H = out_BKNH.shape
  out_BKGTH = shaped(out_BKNH, "BKGTH", (B, K, G, T, H))
  return checkpoint_name(jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)), "attention")


def scores(call: Call) -> tuple[jax.Array, jax.Array]:
  """The score of each query and key, (B, K, N, S) float32, and whether it counts, (B, N, S)."""
  B, T, K, G, H = call.q_BTKGH.shape
  mask_BTS = visible(call.queries, call.keys, call.form)
  S = mask_BTS.shape[-1]
  # Reshaping says its sharding: that of a dim of size 1 would be lost.
  mask_BNS = shaped(jnp.broadcast_to(mask_BTS[:, None], (B, G, T, S)), "BNS", (B, G * T, S))
  q_BKGTH = jnp.transpose(call.q_BTKGH, (0, 2, 3, 1, 4))
  q_BKNH = shaped(q_BKGTH, "BKNH", (B, K, G * T, H))
  k_BKSH = jnp.transpose(call.k_BSKH, (0, 2, 1, 3))
  score_BKNS = jnp.einsum(
    "bknh,bksh->bkns", q_BKNH, k_BKSH, preferred_element_type=raised(q_BKNH.dtype)
  )
  if (cap := call.form.softcap) is not None:
    score_BKNS = cap * jnp.tanh(score_BKNS / cap)
  if call.bias_KGP is not None:
    score_BKNS += shaped(by_column(call.bias_KGP, T), "KNS", score_BKNS.shape[1:])
  return score_BKNS, mask_BNS


def by_column(bias_KGP, T: int) -> jax.Array:
  """A bias by distance for each of T queries and each key, (K, G, T, S).

  Row t is the vector from p = T - 1 - t on. Laid end to end with one more entry each, the T copies
  of it begin one column later in every row of the old length: all is copying, and no index is
  looked up, whose gradient would be a scatter.
  """
  K, G, P = bias_KGP.shape
  copies_KGTP = jnp.broadcast_to(bias_KGP[:, :, None], (K, G, T, P))
  copies_KGTP = jnp.pad(copies_KGTP, ((0, 0), (0, 0), (0, 0), (0, 1)))
  line_KGN = shaped(copies_KGTP, "KGN", (K, G, T * (P + 1)))[..., : T * P]
  return shaped(line_KGN, "KGTP", (K, G, T, P))[..., T - 1 :]


def shaped(x, dims: str, shape) -> jax.Array:
  return jnp.reshape(x, shape, out_sharding=sharding.act(dims))
