"""Splash attention, jax's Pallas kernel for TPU: it visits only blocks that somebody sees.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all K*G query
heads, H head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigtrain import mesh
from bigtrain.kernels.attention.call import Call, Form, documents, named
from bigtrain.kernels.attention.island import apart, misplaced

LANES = 128  # Of a TPU's vectors: what a block of queries or keys is a multiple of.
# The largest that divides the row. Larger blocks mean fewer steps and fewer reads of k and v, until
# a step's scores, 512 * 512 in float32, crowd out of a core's vector memory what comes next; much
# above that, blocks on the diagonal are also computed that are half masked.
BLOCKS = (512, 256, 128)

# Keys up to which the backward pass is by one kernel, of five products instead of the seven of two.
# It writes the gradient of the queries once for each block of keys, to be added.
FUSED = 16 * BLOCKS[0]
# Keys of such a kernel, at most; twice as many in rows of more than four times that. Larger ones
# compute more that is masked (18% more products at a quarter of the row), and have fewer gradients
# of the queries to write and to add.
KEYS = 1024
MANY = 16  # Of them, at most: a row that divides into none but small ones takes the two.


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
    B, T, K, G, H = q_BTKGH.shape
    q_BNTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4)).reshape(B, K * G, T, H)
    # Kept as the kernel takes them: in another order they would be copied in both passes.
    inputs = named(q_BNTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    S = k_BSKH.shape[1]
    one = S <= FUSED and MANY * _keys(S) >= S
    row = functools.partial(_fused if one else _plain, call.form, interpret)
    out_BNTH: Any = jax.vmap(row)(*inputs, query_BT, key_BS)
    out_BKGTH = out_BNTH.reshape(B, K, G, T, H)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4))

  arrays = call.q_BTKGH, call.k_BSKH, call.v_BSKH, query_BT, key_BS
  return apart(local, *arrays, opaque=True)


def _plain(form: Form, interpret: bool, q_NTH, k_KSH, v_KSH, query_T, key_S) -> jax.Array:
  """Of one row (N, T, H), with the library's own backward pass of two kernels."""
  sizes = (len(q_NTH), q_NTH.shape[1], k_KSH.shape[1])
  settings = {"interpret": interpret, "residual_checkpoint_name": "attention"}
  kernel = _kernel(form, *sizes, fused=False, **settings)
  return kernel(q_NTH, k_KSH, v_KSH, _segments(query_T, key_S))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(form: Form, interpret: bool, q_NTH, k_KSH, v_KSH, query_T, key_S) -> jax.Array:
  """As `_plain`, with a backward pass of one kernel for each block of keys.

  The library's calls it once for all blocks and gets a gradient of the queries from each. Their sum
  was a reduction, which took XLA five times as long as to add them.
  """
  return _fused_forward(form, interpret, q_NTH, k_KSH, v_KSH, query_T, key_S)[0]


def _fused_forward(form: Form, interpret: bool, q_NTH, k_KSH, v_KSH, query_T, key_S) -> Any:
  sizes = (len(q_NTH), q_NTH.shape[1], k_KSH.shape[1])
  kernel = _kernel(form, *sizes, interpret=interpret, save_residuals=True)
  results = kernel(q_NTH, k_KSH, v_KSH, _segments(query_T, key_S))
  out_NTH, (logsumexp_NT,) = jax.tree.map(lambda a: checkpoint_name(a, "attention"), results)
  return out_NTH, (q_NTH, k_KSH, v_KSH, query_T, key_S, out_NTH, logsumexp_NT)


def _fused_backward(form: Form, interpret: bool, kept, dout_NTH) -> Any:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  q_NTH, k_KSH, v_KSH, query_T, key_S, out_NTH, logsumexp_NT = kept
  wide = jnp.float32
  dot_NT = jnp.einsum("nth,nth->nt", out_NTH.astype(wide), dout_NTH.astype(wide))
  (N, T, _), S = q_NTH.shape, k_KSH.shape[1]
  size = _keys(S)
  dq_NTH, dkv = jnp.zeros(q_NTH.shape, wide), []
  for first in range(0, S, size):
    kernel = _kernel(form, N, T, size, first, interpret=interpret)
    blocks = kernel.kwargs["block_sizes"]
    here = lambda a, axis, first=first: jax.lax.slice_in_dim(a, first, first + size, axis=axis)
    found: Any = splash._splash_attention_bwd_dkv(
      q_NTH,
      here(k_KSH, 1),
      here(v_KSH, 1),
      _segments(query_T, here(key_S, 0)),
      None,
      logsumexp_NT,
      dout_NTH,
      dot_NT,
      bq=blocks.block_q_dkv,
      bkv=size,
      bkv_compute=blocks.block_kv_dkv_compute,
      is_mqa=False,
      mask_info=kernel.dkv_mask_info,
      mask_value=kernel.kwargs["mask_value"],
      attn_logits_soft_cap=form.softcap,
      use_fused_bwd_kernel=True,
      q_layout=blocks.q_layout,
      k_layout=blocks.k_layout,
      v_layout=blocks.v_layout,
      mask_function=kernel.kwargs["mask_function"],
      interpret=interpret,
    )
    dq_NTH += found[0].astype(wide)
    dkv.append(found[1:])
  dk_KSH, dv_KSH = (jnp.concatenate(parts, axis=1) for parts in zip(*dkv, strict=True))
  return dq_NTH.astype(q_NTH.dtype), dk_KSH, dv_KSH, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _segments(query_T, key_S):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  return splash.SegmentIds(query_T, key_S)


def _block(size: int, sizes: tuple[int, ...]) -> int:
  """The first of the sizes that divides a row of so many."""
  return next(n for n in sizes if size % n == 0)


def _keys(S: int) -> int:
  """How many keys each kernel of the backward pass takes, of a row of so many."""
  most, unit = KEYS * (1 + (S > 4 * KEYS)), _block(S, BLOCKS)
  return max(n for n in range(unit, max(most, unit) + 1, unit) if S % n == 0)


def _kernel(
  form: Form, heads: int, T: int, S: int, first: int = 0, *, fused: bool = True, **settings
) -> Any:
  """The library's, of T queries and the S keys from column `first` on."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  if form.window is not None:
    reach = form.window - 1
    mask = masks.LocalMask((T, S), (reach, 0 if form.causal else reach), offset=-first)
  else:
    mask = masks.CausalMask((T, S), -first) if form.causal else masks.FullMask((T, S))
  queries, keys = (_block(size, BLOCKS) for size in (T, S))
  sizes = splash.BlockSizes(
    block_q=queries,
    block_kv=keys,
    block_q_dkv=queries,
    block_kv_dkv=S if fused else keys,
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
    **settings,
  )
