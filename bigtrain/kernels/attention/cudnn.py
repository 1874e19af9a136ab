"""cuDNN's attention on GPU, through jax.nn.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all K*G query
heads, H head.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigtrain import mesh
from bigtrain.kernels.attention.call import Call, Form, documents
from bigtrain.kernels.attention.island import apart, misplaced

# Documents reach cuDNN as a bias of (B, T, S) scores, of which it has no smaller form that fits
# packed rows of any number of documents: 32 MiB a row at this length. Longer rows go blockwise.
PACKED = 4096


def limit(form: Form, dropout: float) -> str | None:
  """Why this kernel cannot compute such a form, if it cannot."""
  if dropout:
    return "it has no dropout that is the same on every mesh"
  if form.softcap is not None:
    return "it has no soft cap"
  if form.window is not None and not form.causal:
    return "it has windows for causal attention only"
  return None


def unfit(call: Call) -> str | None:
  """Why this kernel cannot answer this call, if it cannot."""
  form, H, dtype = call.form, call.q_BTKGH.shape[-1], call.q_BTKGH.dtype
  if (here := mesh.platform()) != "gpu":
    return f"it runs on GPU, not on {here}"
  if call.bias_KGP is not None:
    return "biases of scores would reach it as an array of all scores"
  if form.causal and not form.aligned:
    return "queries and keys do not stand in the same columns"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, not in {dtype}"
  if H % 8 or H > 128:
    return f"heads of {H} are not a multiple of 8 up to 128"
  if call.q_BTKGH.shape[1] % 2 or call.k_BSKH.shape[1] % 2:
    return "rows of an odd length do not fit it"
  if (longest := max(call.q_BTKGH.shape[1], call.k_BSKH.shape[1])) > PACKED:
    return f"rows of {longest} are longer than {PACKED}"
  return misplaced(call.q_BTKGH, opaque=True)


def attend(call: Call, *, implementation: Literal["cudnn", "xla"] = "cudnn") -> jax.Array:
  """See `bigtrain.kernels.attention.attend`."""
  form, query_BT, key_BS = call.form, None, None
  if call.queries.segments is not None or not form.aligned:
    query_BT, key_BS = documents(call.queries, call.keys)

  def local(q_BTKGH, k_BSKH, v_BSKH, query_BT, key_BS):
    B, T, K, G, H = q_BTKGH.shape
    mask_BNTS = None
    if query_BT is not None:
      mask_BNTS = query_BT[:, None, :, None] == key_BS[:, None, None, :]  # N is 1: of all heads.
    out_BTNH = jax.nn.dot_product_attention(
      q_BTKGH.reshape(B, T, K * G, H),
      k_BSKH,
      v_BSKH,
      mask=mask_BNTS,
      scale=1.0,
      is_causal=form.causal,
      local_window_size=None if form.window is None else (form.window - 1, 0),
      implementation=implementation,
    )
    return out_BTNH.reshape(q_BTKGH.shape)

  arrays = call.q_BTKGH, call.k_BSKH, call.v_BSKH, query_BT, key_BS
  return checkpoint_name(apart(local, *arrays, opaque=True), "attention")
