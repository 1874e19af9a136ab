"""Splash attention, jax's Pallas kernel for TPU: it visits only blocks that somebody sees.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all K*G query
heads, H head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bigtrain import mesh
from bigtrain.kernels.attention.call import Call, Form, documents, named
from bigtrain.kernels.attention.island import apart, misplaced

LANES = 128  # Of a TPU's vectors: what a block of queries or keys is a multiple of.
# The largest that divides the row. Larger blocks mean fewer steps and fewer reads of k and v, until
# a step's scores, 512 * 512 in float32, crowd out of a core's vector memory what comes next; much
# above that, blocks on the diagonal are also computed that are half masked.
BLOCKS = (512, 256, 128)

# Keys up to which the backward pass is one kernel, of five products instead of the seven of two. It
# writes the gradient of the queries once for each block of keys, to be summed.
FUSED = 16 * BLOCKS[0]


def limit(form: Form, dropout: float) -> str | None:
  """Why this kernel cannot compute such a form, if it cannot."""
  return "it has no dropout" if dropout else None


def unfit(call: Call) -> str | None:
  """Why this kernel cannot answer this call, if it cannot."""
  form, T, S = call.form, call.q_BTKGH.shape[1], call.k_BSKH.shape[1]
  if (here := mesh.platform()) != "tpu":
    return f"it runs on TPU, not on {here}"
  if call.bias_KGP is not None:
    return "it has no biases of scores"
  if (form.causal or form.window is not None) and not form.aligned:
    return "queries and keys do not stand in the same columns"
  if T % LANES or S % LANES:
    return f"rows of {T} queries and {S} keys are not multiples of {LANES}"
  return misplaced(call.q_BTKGH, opaque=True)


def attend(call: Call, *, interpret: bool = False) -> jax.Array:
  """See `bigtrain.kernels.attention.attend`."""
  query_BT, key_BS = documents(call.queries, call.keys)
  query_BT = jnp.where(query_BT < 0, -2, query_BT)  # An empty slot sees the empty ones.

  def local(q_BTKGH, k_BSKH, v_BSKH, query_BT, key_BS):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    B, T, K, G, H = q_BTKGH.shape
    kernel = _kernel(call.form, K * G, T, k_BSKH.shape[1], interpret)
    q_BNTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4)).reshape(B, K * G, T, H)
    # Kept as the kernel takes them: in another order they would be copied in both passes.
    inputs = named(q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    of_row: Any = lambda q, k, v, *segments: kernel(q, k, v, splash.SegmentIds(*segments))
    out_BNTH: Any = jax.vmap(of_row)(*inputs, query_BT, key_BS)
    out_BKGTH = out_BNTH.reshape(B, K, G, T, H)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4))

  arrays = call.q_BTKGH, call.k_BSKH, call.v_BSKH, query_BT, key_BS
  return apart(local, *arrays, opaque=True)


def _block(size: int, sizes: tuple[int, ...]) -> int:
  """The first of the sizes that divides a row of so many."""
  return next(n for n in sizes if size % n == 0)


def _kernel(form: Form, heads: int, T: int, S: int, interpret: bool):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  if form.window is not None:
    reach = form.window - 1
    mask = masks.LocalMask((T, S), (reach, 0 if form.causal else reach), offset=0)
  else:
    mask = masks.CausalMask((T, S)) if form.causal else masks.FullMask((T, S))
  queries, keys = (_block(size, BLOCKS) for size in (T, S))
  # The fused backward pass writes the queries' gradient once for each block of keys: larger ones
  # compute more that is masked (18% more products at a quarter of the row), write and sum less.
  loaded = _block(S, (2048, 1024, *BLOCKS) if S > 4096 else (1024, *BLOCKS))
  fused = S <= FUSED
  sizes = splash.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_q_dkv=queries,
    block_kv_dkv=loaded if fused else keys,
    block_kv_dkv_compute=keys,
    use_fused_bwd_kernel=fused,
    block_q_dq=None if fused else queries,
    block_kv_dq=None if fused else keys,
  )
  return splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=form.softcap,
    residual_checkpoint_name="attention",
    interpret=interpret,
  )
