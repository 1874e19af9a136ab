"""Attention block by block: memory grows with the length of a row and not with its square.

The softmax of a query is put together from blocks of keys, and the backward pass computes the
scores again from what the forward pass kept, the output and the logarithm of the normaliser
(FlashAttention-2, Dao 2023, arXiv:2307.08691). Blocks that nobody sees are left out where columns
tell (`Form.aligned`). Plain jax: it runs everywhere, and on CPU it is the fastest form.

An island that brings keys from elsewhere, as a ring does, calls `part_of`, `forward`, `backward`
and `block.merged`.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head, P
distance: of a query and a key, T + S - 1 of them, E element of a dropout key, N block of queries.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bigtrain import sharding
from bigtrain.dropout import row_keys
from bigtrain.kernels.attention import block
from bigtrain.kernels.attention.block import NOTHING, Part, Settings, cut, merged
from bigtrain.kernels.attention.call import Call, Form, Tokens, documents
from bigtrain.kernels.attention.island import apart, misplaced
from bigtrain.mesh import ordered
from bigtrain.precision import raised

QUERIES, KEYS = 128, 512  # Of a block, at most.
UNROLLED = 512  # Queries whose blocks are written out one by one; where there are more, loops.


def limit(form: Form, dropout: float) -> str | None:
  """Why this kernel cannot compute such a form, if it cannot."""


def unfit(call: Call) -> str | None:
  """Why this kernel cannot answer this call, if it cannot."""
  return misplaced(call.q_BTKGH)


def attend(call: Call) -> jax.Array:
  """See `bigtrain.kernels.attention.attend`. A query that sees nothing gets zeros."""
  seeds_BKE, dropout = None, 0.0
  if call.dropout and call.key is not None:
    # A key for each row and kv head: the same bits wherever these lie.
    split = functools.partial(jax.random.split, num=call.k_BSKH.shape[2])
    keys_BK = jax.vmap(split)(row_keys(call.key, call.q_BTKGH))
    seeds_BKE, dropout = sharding.lay(jax.random.key_data(keys_BK), "BKE"), call.dropout
  settings = Settings(call.form, dropout)

  def local(q_BTKGH, k_BSKH, v_BSKH, bias_KGP, queries, keys, seeds_BKE):
    arrays = (jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4)), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))
    part = part_of(settings.form, *arrays, queries, keys, bias_KGP, seeds_BKE)
    return jnp.transpose(_attention(settings, part), (0, 3, 1, 2, 4))

  arrays = (call.k_BSKH, call.v_BSKH, call.bias_KGP, call.queries, call.keys, seeds_BKE)
  return apart(local, call.q_BTKGH, *arrays)


def part_of(
  form: Form, q_BKGTH, k_BKSH, v_BKSH, queries: Tokens, keys: Tokens, bias_KGP=None, seeds_BKE=None
) -> Part:
  """Attention of these queries to these keys on one device."""
  arrays: Any = (q_BKGTH, k_BKSH, v_BKSH, bias_KGP)
  positions = None
  if not form.aligned and (form.causal or form.window is not None):
    positions = queries.positions, keys.positions
  axes = _varying(arrays)
  arrays = jax.tree.map(lambda x: _over(axes, x), arrays)
  query_BT, key_BS = documents(queries, keys)
  return Part(*arrays, query_BT=query_BT, key_BS=key_BS, positions=positions, seeds_BKE=seeds_BKE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: Settings, part: Part) -> jax.Array:
  return forward(settings, part)[0]


def _keep(settings, part):
  out_BKGTH, lse_BKGT = (checkpoint_name(x, "attention") for x in forward(settings, part))
  return out_BKGTH, (part, out_BKGTH, lse_BKGT)


def _pull(settings, kept, dout_BKGTH):
  part, out_BKGTH, lse_BKGT = kept
  delta_BKGT = (dout_BKGTH.astype(lse_BKGT.dtype) * out_BKGTH).sum(-1)
  gradients: Any = backward(settings, part, lse_BKGT, delta_BKGT, dout_BKGTH)
  return (Part(*gradients, query_BT=None, key_BS=None, offset=None),)


_attention.defvjp(_keep, _pull)


def forward(settings: Settings, part: Part) -> tuple[jax.Array, jax.Array]:
  """The output (B, K, G, T, H), in the dtype of `v`, and each query's logsumexp (B, K, G, T)."""
  T, S, dtype = part.q_BKGTH.shape[3], part.k_BKSH.shape[2], part.v_BKSH.dtype
  if T <= UNROLLED:
    found = []
    for t, queries, spans in _spans(settings.form, T, S):
      blocks = [block.forward(settings, cut(part, t, queries, s, keys)) for s, keys in spans]
      found.append(functools.reduce(merged, blocks))
    out_BKGTH, lse_BKGT = (jnp.concatenate(x, 3) for x in zip(*found, strict=True))
    return out_BKGTH.astype(dtype), lse_BKGT
  part = _padded(part)
  nothing = _zeros(part, part.q_BKGTH[..., :QUERIES, :])

  def of_queries(_, at):
    t, first, last = at
    at_keys = lambda i: cut(part, t, QUERIES, i * KEYS, KEYS)
    add = lambda i, found: merged(found, block.forward(settings, at_keys(i)))
    out, lse = jax.lax.fori_loop(first, last, add, (nothing, nothing[..., 0] + NOTHING))
    return None, (out.astype(dtype), lse)

  _, found = jax.lax.scan(of_queries, None, _bounds(settings.form, T, S))
  out_BKGTH, lse_BKGT = (_joined(x)[:, :, :, :T] for x in found)
  return out_BKGTH, lse_BKGT


def backward(settings: Settings, part: Part, lse_BKGT, delta_BKGT, dout_BKGTH) -> tuple:
  """The gradients of q, k, v and the bias.

  Args:
    lse_BKGT: logsumexp of all scores of a query, of these keys and of others.
    delta_BKGT: sum over H of a query's output, from all keys, times its cotangent.
    dout_BKGTH: that cotangent.
  """
  T, S, primals = part.q_BKGTH.shape[3], part.k_BKSH.shape[2], part[:4]
  given = lse_BKGT, delta_BKGT, dout_BKGTH
  if T > UNROLLED:
    part, given = _padded(part), tuple(_pad(x, 3, QUERIES) for x in given)
  rows = part.q_BKGTH.shape[3]
  sums: Any = [jax.tree.map(lambda x: _zeros(part, x), x) for x in part[1:4]]

  def add(sums, t, queries, s, keys):
    """The block's gradient of q, and the sums of the others with what it adds."""
    here = (jax.lax.dynamic_slice_in_dim(x, t, queries, 3) for x in given)
    dq, *parts = block.backward(settings, cut(part, t, queries, s, keys), *here)
    starts = (s, s, s - t + rows - queries)
    return dq, [
      None if x is None else _added(x, y, at) for x, y, at in zip(sums, parts, starts, strict=True)
    ]

  if T <= UNROLLED:
    found = []
    for t, queries, spans in _spans(settings.form, T, S):
      parts = []
      for s, keys in spans:
        dq, sums = add(sums, t, queries, s, keys)
        parts.append(dq)
      found.append(functools.reduce(jnp.add, parts))
    dq_BKGTH = jnp.concatenate(found, 3)
  else:
    nothing = _zeros(part, part.q_BKGTH[..., :QUERIES, :])

    def of_queries(sums, at):
      t, first, last = at

      def step(i, carry):
        dq, sums = carry
        more, sums = add(sums, t, QUERIES, i * KEYS, KEYS)
        return dq + more, sums

      dq, sums = jax.lax.fori_loop(first, last, step, (nothing, sums))
      return sums, dq

    sums, found = jax.lax.scan(of_queries, sums, _bounds(settings.form, T, S))
    dq_BKGTH = _joined(found)[:, :, :, :T]
  dk_BKSH, dv_BKSH, dbias_KGP = sums
  if dbias_KGP is not None:
    dbias_KGP = dbias_KGP[..., rows - T :][..., : T + S - 1]
  gradients = dq_BKGTH, dk_BKSH[:, :, :S], dv_BKSH[:, :, :S], dbias_KGP
  return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, primals)


def _seen(form: Form, t: int, queries: int, S: int) -> tuple[int, int]:
  """The columns of keys, from and to, of which queries t to t + queries see any."""
  if not form.aligned:
    return 0, S
  reach = S if form.window is None else form.window - 1
  return max(t - reach, 0), min(t + queries + (0 if form.causal else reach), S)


def _spans(form: Form, T: int, S: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
  """Blocks of queries (first, how many), each with spans of the keys that they see."""
  for t in range(0, T, QUERIES):
    queries = min(QUERIES, T - t)
    first, last = _seen(form, t, queries, S)
    yield t, queries, [(s, min(KEYS, last - s)) for s in range(first, last, KEYS)]


def _bounds(form: Form, T: int, S: int) -> tuple[np.ndarray, ...]:
  """The first query of every block, and the blocks of keys that it sees, from and to."""
  starts = np.arange(0, T, QUERIES)
  first, last = np.array([_seen(form, int(t), QUERIES, S) for t in starts]).T
  return starts, first // KEYS, -(-last // KEYS)


def _padded(part: Part) -> Part:
  """Whole blocks: what is added belongs to no document."""
  queries, keys = (lambda x, dim: _pad(x, dim, QUERIES)), (lambda x, dim: _pad(x, dim, KEYS))
  T, S, bias_KGP, positions = part.q_BKGTH.shape[3], part.k_BKSH.shape[2], part.bias_KGP, None
  if bias_KGP is not None:
    bias_KGP = jnp.pad(bias_KGP, ((0, 0), (0, 0), (-T % QUERIES, -S % KEYS)))
  if part.positions is not None:
    positions = queries(part.positions[0], 1), keys(part.positions[1], 1)
  return Part(
    queries(part.q_BKGTH, 3),
    keys(part.k_BKSH, 2),
    keys(part.v_BKSH, 2),
    bias_KGP,
    jnp.pad(part.query_BT, ((0, 0), (0, -T % QUERIES)), constant_values=-1),
    jnp.pad(part.key_BS, ((0, 0), (0, -S % KEYS)), constant_values=-2),
    positions,
    part.seeds_BKE,
  )


def _pad(x, dim: int, multiple: int) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[dim] = (0, -x.shape[dim] % multiple)
  return jnp.pad(x, widths)


def _joined(x_NBKGTH) -> jax.Array:
  """Blocks of queries side by side."""
  x_BKGNTH = jnp.moveaxis(x_NBKGTH, 0, 3)
  return x_BKGNTH.reshape(*x_BKGNTH.shape[:3], -1, *x_BKGNTH.shape[5:])


def _added(total, more, start) -> jax.Array:
  """`more` added to what lies from `start` on in dim 2."""
  here = jax.lax.dynamic_slice_in_dim(total, start, more.shape[2], 2)
  return jax.lax.dynamic_update_slice_in_dim(total, here + more, start, 2)


def _zeros(part: Part, like) -> jax.Array:
  """Float32 zeros of the shape of an array, which vary over devices as the part does."""
  return _over(_varying(part.q_BKGTH), jnp.zeros(like.shape, raised(like.dtype)))


def _varying(tree) -> frozenset[str]:
  return frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))


def _over(axes: frozenset[str], x) -> jax.Array:
  """An array typed as varying over these axes; its gradient is summed over those that are new."""
  return jax.lax.pcast(x, ordered(axes - _varying(x)), to="varying")
