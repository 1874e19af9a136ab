"""One block of attention: some queries, some keys, and the gradient of what they make together.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all G*T of
them, H head, P distance: of a query and a key, T + S - 1 of them, E element of a dropout key.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigtrain.kernels.attention.call import Form
from bigtrain.kernels.attention.plain import MASKED, by_column
from bigtrain.precision import raised

NOTHING = -1e20  # The logsumexp of no scores: so far above MASKED that exp(MASKED - it) is 0.


class Settings(NamedTuple):
  """What is known of attention while it is traced."""

  form: Form
  dropout: float = 0.0


class Part(NamedTuple):
  """Queries, which are scaled, and keys: all that a device has of them, or a block."""

  q_BKGTH: Any
  k_BKSH: Any
  v_BKSH: Any
  bias_KGP: Any  # As in `attend`; None without.
  query_BT: Any  # The document of each query, and
  key_BS: Any  # of each key: equal where they may see each other.
  # Positions of queries (B, T) and keys (B, S); None where columns or nothing tells who sees whom.
  positions: Any = None
  seeds_BKE: Any = None  # A dropout key for each row and kv head; None without dropout.
  offset: Any = 0  # Columns from the first key to the first query.


def cut(part: Part, t, queries: int, s, keys: int) -> Part:
  """The block of so many queries from column t on, and keys from s on."""
  take = jax.lax.dynamic_slice_in_dim
  T, bias_KGP, positions, seeds_BKE = part.q_BKGTH.shape[3], part.bias_KGP, None, None
  if bias_KGP is not None:
    bias_KGP = take(bias_KGP, s - t + T - queries, queries + keys - 1, 2)
  if part.positions is not None:
    of_BT, of_BS = part.positions
    positions = take(of_BT, t, queries, 1), take(of_BS, s, keys, 1)
  if part.seeds_BKE is not None:
    seeds_BKE = _each_key(
      lambda k: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(k, t), s)), part
    )
  return Part(
    take(part.q_BKGTH, t, queries, 3),
    take(part.k_BKSH, s, keys, 2),
    take(part.v_BKSH, s, keys, 2),
    bias_KGP,
    take(part.query_BT, t, queries, 1),
    take(part.key_BS, s, keys, 1),
    positions,
    seeds_BKE,
    t - s,
  )


def merged(one: tuple, other: tuple) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of two sets of keys as that of both."""
  lse = jnp.logaddexp(one[1], other[1])
  weigh = lambda x: x[0] * jnp.exp(x[1] - lse)[..., None]
  return weigh(one) + weigh(other), lse


def forward(settings: Settings, part: Part) -> tuple[jax.Array, jax.Array]:
  """The output (B, K, G, T, H) and each query's logsumexp (B, K, G, T), in float32.

  A query that sees nothing has the output 0 and the logsumexp NOTHING.
  """
  score_BKGTS, _ = _scores(settings.form, part)
  high_BKGT = jnp.maximum(score_BKGTS.max(-1), NOTHING)
  exp_BKGTS = jnp.exp(score_BKGTS - high_BKGT[..., None])
  total_BKGT = jnp.maximum(exp_BKGTS.sum(-1), 1)  # The highest score alone makes it 1.
  if (keep_BKGTS := _kept(settings, part)) is not None:
    exp_BKGTS *= keep_BKGTS
  out_BKNH = _product("bkns,bksh->bknh", _rows(exp_BKGTS, part.v_BKSH.dtype), part.v_BKSH)
  out_BKGTH = out_BKNH.reshape(part.q_BKGTH.shape) / total_BKGT[..., None]
  return out_BKGTH, high_BKGT + jnp.log(total_BKGT)


def backward(settings: Settings, part: Part, lse_BKGT, delta_BKGT, dout_BKGTH):
  """The gradients of q, k, v and the bias in float32; see `blockwise.backward`."""
  dtype = part.q_BKGTH.dtype
  score_BKGTS, pull = _scores(settings.form, part)
  prob_BKGTS = jnp.exp(score_BKGTS - lse_BKGT[..., None])
  dout_BKNH = _rows(dout_BKGTH, dtype)
  dprob_BKNS = _product("bknh,bksh->bkns", dout_BKNH, part.v_BKSH)
  dprob_BKGTS, used_BKGTS = dprob_BKNS.reshape(prob_BKGTS.shape), prob_BKGTS
  if (keep_BKGTS := _kept(settings, part)) is not None:
    dprob_BKGTS, used_BKGTS = dprob_BKGTS * keep_BKGTS, prob_BKGTS * keep_BKGTS
  dv_BKSH = _product("bkns,bknh->bksh", _rows(used_BKGTS, dtype), dout_BKNH)
  draw_BKGTS, dbias_KGP = pull(prob_BKGTS * (dprob_BKGTS - delta_BKGT[..., None]))
  draw_BKNS = _rows(draw_BKGTS, dtype)
  dq_BKNH = _product("bkns,bksh->bknh", draw_BKNS, part.k_BKSH)
  dk_BKSH = _product("bkns,bknh->bksh", draw_BKNS, _rows(part.q_BKGTH, dtype))
  return dq_BKNH.reshape(part.q_BKGTH.shape), dk_BKSH, dv_BKSH, dbias_KGP


def _scores(form: Form, part: Part):
  """The scores, MASKED where nothing is seen, and how their gradient goes back.

  That is a function which gives the gradients of the bare products and of the bias.
  """
  q_BKNH = _rows(part.q_BKGTH, part.q_BKGTH.dtype)
  raw_BKNS = _product("bknh,bksh->bkns", q_BKNH, part.k_BKSH)
  *sizes, T, _ = part.q_BKGTH.shape
  raw_BKGTS = raw_BKNS.reshape(*sizes, T, -1)
  mask_BTS = _visible(form, part)

  def finish(score_BKGTS, bias_KGP):
    if (cap := form.softcap) is not None:
      score_BKGTS = cap * jnp.tanh(score_BKGTS / cap)
    if bias_KGP is not None:
      score_BKGTS += by_column(bias_KGP, T)
    return jnp.where(mask_BTS[:, None, None], score_BKGTS, MASKED)

  return jax.vjp(finish, raw_BKGTS, part.bias_KGP)


def _visible(form: Form, part: Part) -> jax.Array:
  mask_BTS = part.query_BT[:, :, None] == part.key_BS[:, None, :]
  if form.aligned:
    columns = [jax.lax.iota(jnp.int32, n) for n in mask_BTS.shape[1:]]
    return mask_BTS & form.sees(part.offset + columns[0][:, None] - columns[1])
  if part.positions is not None:
    of_BT, of_BS = part.positions
    mask_BTS &= form.sees(of_BT[:, :, None] - of_BS[:, None, :])
  return mask_BTS


def _kept(settings: Settings, part: Part):
  """1 / (1 - rate) for each weight that is kept, else 0: (B, K, G, T, S); None without dropout."""
  if part.seeds_BKE is None:
    return None
  _, _, G, T, _ = part.q_BKGTH.shape
  keep, shape = 1 - settings.dropout, (G, T, part.k_BKSH.shape[2])
  return _each_key(lambda key: jax.random.bernoulli(key, keep, shape), part) / keep


def _each_key(function, part: Part):
  """A function of a dropout key, for each row and kv head."""
  wrapped = lambda seed_E: function(jax.random.wrap_key_data(seed_E))
  return jax.vmap(jax.vmap(wrapped))(part.seeds_BKE)


def _rows(x_BKGTH, dtype) -> jax.Array:
  """All queries of a kv head as the rows of one matrix."""
  B, K, G, T, H = x_BKGTH.shape
  return x_BKGTH.reshape(B, K, G * T, H).astype(dtype)


def _product(dims: str, a, b) -> jax.Array:
  return jnp.einsum(dims, a, b, preferred_element_type=raised(a.dtype))
