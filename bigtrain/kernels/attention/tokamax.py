"""Attention of tokamax, an extra (`kernels`), which has one for every chip.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all K*G query
heads, H head.
"""

import importlib
import importlib.util
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from bigtrain import hints
from bigtrain.kernels.attention.call import Call, Form, visible
from bigtrain.kernels.attention.island import apart, misplaced


def limit(form: Form, dropout: float) -> str | None:
  """Why this kernel cannot compute such a form, if it cannot."""
  if importlib.util.find_spec("tokamax") is None:
    return f"it is not installed ({hints.installed('kernels', '3.12')})"
  return "it has no dropout" if dropout else None


def unfit(call: Call) -> str | None:
  """Why this kernel cannot answer this call, if it cannot."""
  if call.bias_KGP is not None:
    return "biases of scores would reach it as an array of all scores"
  return misplaced(call.q_BTKGH, opaque=True)


def attend(call: Call) -> jax.Array:
  """See `bigtrain.kernels.attention.attend`.

  Who sees whom reaches it as (B, T, S) bits where columns do not tell.
  """
  library: Any = importlib.import_module("tokamax")
  form = call.form
  columns = form.aligned and call.queries.segments is None
  tokens: Any = None if columns else (call.queries, call.keys)
  window = None
  if columns and form.window is not None:
    window = (form.window - 1, 0 if form.causal else form.window - 1)

  def local(q_BTKGH, k_BSKH, v_BSKH, tokens):
    B, T, K, G, H = q_BTKGH.shape
    out_BTNH = library.dot_product_attention(
      q_BTKGH.reshape(B, T, K * G, H),
      k_BSKH,
      v_BSKH,
      mask=None if tokens is None else visible(tokens[0], tokens[1], form)[:, None],
      scale=1.0,
      is_causal=columns and form.causal,
      local_window_size=window,
      logits_soft_cap=form.softcap,
    )
    return out_BTNH.reshape(q_BTKGH.shape)

  arrays = call.q_BTKGH, call.k_BSKH, call.v_BSKH, tokens
  return checkpoint_name(apart(local, *arrays, opaque=True), "attention")
