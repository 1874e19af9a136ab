"""Cases of attention, and their answers in float64 from the formula.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head, P
distance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import sharding
from bigtrain.kernels.attention import Form, Tokens
from bigtrain.kernels.attention.call import Call

B, K, G, H = 4, 2, 3, 8

FORMS = {
  "causal": Form(causal=True, aligned=True),
  "both ways": Form(causal=False, aligned=True),
  "window": Form(causal=True, window=6, aligned=True),
  "window both ways": Form(causal=False, window=6, aligned=True),
  "soft cap": Form(causal=True, softcap=0.7, aligned=True),
  "by position": Form(causal=True, window=9),
}


def call(form: Form, T: int, *, rows=B, segments=True, bias=False, dtype=np.float32) -> Call:
  """Random arrays for rows of T: packed documents, then padding; or one document and empty slots.

  Where columns do not tell the order of positions, they are shuffled.
  """
  r = np.random.default_rng(0)
  normal = lambda *shape: r.normal(size=shape).astype(dtype)
  arrays = normal(rows, T, K, G, H), normal(rows, T, K, H), normal(rows, T, K, H)
  columns = np.arange(T)
  ends = np.sort(r.permuted(np.tile(columns[1 : T - 5], (rows, 1)), axis=1)[:, :3], axis=1)
  ends[:, -1] = T - 2 - np.arange(rows)
  document = (columns[None] >= ends[..., None]).sum(1)
  starts = np.pad(ends, ((0, 0), (1, 0)))
  if segments:
    positions = columns - np.take_along_axis(starts, document, axis=1)
    tokens = Tokens(np.int32(positions), np.int32(np.where(document == 3, 0, document + 1)))
  else:
    tokens = Tokens(np.int32(np.where(document == 3, -1, columns)))
  if not form.aligned:
    order = r.permutation(T)
    tokens = jax.tree.map(lambda x: x[:, order], tokens)
  return Call(*arrays, tokens, tokens, form, normal(K, G, 2 * T - 1) if bias else None)


def mask(c: Call) -> np.ndarray:
  """Who sees whom, (B, T, S), written out."""
  q, k, form = c.queries, c.keys, c.form
  at = lambda tokens: np.arange(tokens.positions.shape[1])[None] + 0 * tokens.positions
  where = at if form.aligned else lambda tokens: np.asarray(tokens.positions)
  distance = where(q)[:, :, None] - where(k)[:, None, :]
  seen = (q.positions[:, :, None] >= 0) & (k.positions[:, None, :] >= 0)
  if q.segments is not None:
    seen = seen & (q.segments[:, :, None] == k.segments[:, None, :])
  if form.causal:
    seen = seen & (distance >= 0)
  if form.window is not None:
    seen = seen & (np.abs(distance) < form.window)
  return seen


def formula(c: Call, arrays, keep_BKGTS=1.0):
  """Attention as in the papers; a query that sees nothing gives 0."""
  q, k, v, bias = arrays
  score = jnp.einsum("btkgh,bskh->bkgts", q, k)
  if c.form.softcap is not None:
    score = c.form.softcap * jnp.tanh(score / c.form.softcap)
  T, S = score.shape[-2:]
  if bias is not None:
    score += bias[:, :, np.arange(S) - np.arange(T)[:, None] + T - 1]
  exp = jnp.exp(score) * mask(c)[:, None, None]
  total = exp.sum(-1, keepdims=True)
  prob = exp / jnp.where(total == 0, 1, total)
  return jnp.einsum("bkgts,bskh->btkgh", prob * keep_BKGTS, v)


def cotangent(c: Call) -> np.ndarray:
  return np.random.default_rng(1).normal(size=c.q_BTKGH.shape).astype(np.float32)


def gradients(function, c: Call):
  """The output of `function(call)`, and the gradients of q, k, v and the bias, compiled."""
  names = ("q_BTKGH", "k_BSKH", "v_BSKH", "bias_KGP")

  def run(arrays, tokens, dout):
    given = c._replace(queries=tokens, keys=tokens)
    out, pull = jax.vjp(
      lambda a: function(given._replace(**dict(zip(names, a, strict=True)))), arrays
    )
    return out, *pull(sharding.lay(dout.astype(out.dtype), "BTKGH"))[0]

  arrays = tuple(getattr(c, name) for name in names)
  return jax.jit(run)(arrays, c.queries, cotangent(c))


def exact(c: Call, keep_BKGTS=1.0):
  """As `gradients`, of the formula in float64."""
  with jax.enable_x64(True):
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (*c[:3], c.bias_KGP))
    run = functools.partial(formula, c, keep_BKGTS=keep_BKGTS)
    out, pull = jax.vjp(run, arrays)
    return jax.tree.map(np.asarray, (out, *pull(jnp.asarray(cotangent(c), jnp.float64))[0]))


def distances(got, want) -> list[float]:
  """Norms of differences, relative to what is wanted."""
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return [np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) for a, b in pairs]
