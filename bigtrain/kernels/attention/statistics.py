"""What attention reports of itself where someone collects, whatever kernel computes it.

Kernels do not keep their scores; those of a sample of queries are computed for the report.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, N all G*T of
them.
"""

import jax
import jax.numpy as jnp

from bigtrain import taps
from bigtrain.kernels.attention import plain
from bigtrain.kernels.attention.call import Call, Tokens

SAMPLED = 128  # Queries of a row, at most, spread evenly.


def report(call: Call) -> None:
  """Taps the highest score as `score_max`, and the mean `entropy` of the weights."""
  taps.tap("score_max", lambda: jnp.max(_scores(call)[0]))
  taps.tap("entropy", lambda: _entropy(*_scores(call)))


def _scores(call: Call) -> tuple[jax.Array, jax.Array]:
  """Scores (B, K, N, S) of sampled queries, low where nothing is seen, and whether (B, N, S)."""
  T = call.q_BTKGH.shape[1]
  stride = -(-T // SAMPLED)
  bias_KGP, call = call.bias_KGP, _thinned(call._replace(bias_KGP=None), stride)
  score_BKNS, mask_BNS = plain.scores(call)
  if bias_KGP is not None:
    score_BKNS += plain.shaped(
      plain.by_column(bias_KGP, T)[:, :, ::stride], "KNS", score_BKNS.shape[1:]
    )
  return jnp.where(mask_BNS[:, None], score_BKNS, plain.MASKED), mask_BNS


def _thinned(call: Call, stride: int) -> Call:
  """Every so manieth query, the first included."""
  queries, keys = call.queries, call.keys
  if call.form.aligned:  # Columns take the place of positions.
    queries, keys = (_by_column(tokens) for tokens in (queries, keys))
  return call._replace(
    q_BTKGH=call.q_BTKGH[:, ::stride],
    queries=jax.tree.map(lambda x: x[:, ::stride], queries),
    keys=keys,
    form=call.form._replace(aligned=False),
  )


def _by_column(tokens: Tokens) -> Tokens:
  columns = jnp.arange(tokens.positions.shape[1])
  return Tokens(jnp.where(tokens.positions < 0, tokens.positions, columns), tokens.segments)


def _entropy(score_BKNS, mask_BNS) -> taps.Mean:
  """The mean entropy of the weights, in nats, over the queries that see anything."""
  p_BKNS = jax.nn.softmax(score_BKNS)
  entropy_BKN = -jnp.sum(p_BKNS * jnp.log(jnp.maximum(p_BKNS, 1e-30)), -1)
  sees_BN = jnp.any(mask_BNS, -1)
  return taps.Mean((entropy_BKN.mean(1) * sees_BN).sum(), sees_BN.sum().astype(jnp.float32))
