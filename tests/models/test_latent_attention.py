"""Latent attention equals its equations in numpy; sampling from a cache equals reading it all.

Dims: B batch, T position, D model.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from bigtrain.config import Refused
from bigtrain.kernels.attention import FEW, Tokens
from bigtrain.models import remat as remats
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer, Normal
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.latent_attention import LatentAttentionConfig
from bigtrain.models.transformer import BlockConfig

B, T, D = 2, 6, 10
C = LatentAttentionConfig(heads=2, q_rank=7, kv_rank=5, head_dim=4, rotary_dim=2, value_dim=3)


def turned(x, t):
  """The one pair of the rotary part, by one radian a position."""
  a, b = x
  return np.array([a * np.cos(t) - b * np.sin(t), b * np.cos(t) + a * np.sin(t)])


def normalised(x):
  return x / np.sqrt((x**2).mean() + 1e-6)


def by_hand(w, x, segments):
  """arXiv:2405.04434, equations 9 and 37 to 47, token by token."""
  y = np.zeros((T, D))
  latent = [normalised(x[t] @ w["kv_down_DL"]) for t in range(T)]
  shared = [turned(x[t] @ w["shared_k_DP"], t) for t in range(T)]
  for t in range(T):
    q_latent = normalised(x[t] @ w["q_down_DL"])
    for head in range(C.heads):
      q = q_latent @ w["q_LKGH"][:, head, 0]
      q = np.concatenate([q[:4], turned(q[4:], t)])
      seen = [s for s in range(t + 1) if segments[s] == segments[t]]
      keys = [np.concatenate([latent[s] @ w["k_LKN"][:, head], shared[s]]) for s in seen]
      scores = np.exp(np.array(keys) @ q / np.sqrt(6))
      values = np.array([latent[s] @ w["v_LKU"][:, head] for s in seen])
      y[t] += (scores / scores.sum()) @ values @ w["o_KUD"][head]
  return y


def test_it_equals_the_equations_of_the_paper():
  layer = C.make(D, Initializer(Normal(std=0.5), 2), jax.random.key(0))
  x = np.random.default_rng(0).normal(size=(B, T, D))
  segments = np.array([[1] * 6, [1, 1, 2, 2, 2, 2]])
  positions = np.tile(np.arange(T), (B, 1))  # Only their differences matter.
  given = Tokens(jnp.asarray(positions), jnp.asarray(segments))
  got, _ = jax.jit(lambda layer, x: layer(x, given))(layer, jnp.float32(x))
  names = ("kv_down_DL", "shared_k_DP", "q_down_DL", "q_LKGH", "k_LKN", "v_LKU", "o_KUD")
  w = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in names}
  for b in range(B):
    np.testing.assert_allclose(got[b], by_hand(w, x[b], segments[b]), atol=1e-4)


def test_tokens_one_by_one_from_a_cache_have_the_logits_of_the_whole_row():
  block = BlockConfig(attention=C, feed_forward=FeedForwardConfig(hidden=8))
  init = Normal(std=0.3)
  c = LanguageModelConfig(vocab=11, dim=D, layers=2, pattern=(block,), init=init, dtype="float32")
  c.check()
  model = c.make(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 11)
  wanted, cache, found = jax.jit(model)(tokens), model.cache(B, T), []
  decode = jax.jit(
    lambda cache, t: model.decode(tokens[:, t][:, None], t + jnp.zeros((B, 1), int), cache)
  )
  for t in range(T):
    logits, cache = decode(cache, t)
    found.append(logits[:, 0])
  np.testing.assert_allclose(np.stack(found, 1), wanted, atol=1e-4)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [("rotary_dim", 3, "even rotary_dim"), ("value_dim", 7, "at most 6"), ("kv_rank", 0, "positive")],
)
def test_what_cannot_be_is_refused(field, value, message):
  c = LatentAttentionConfig(
    **{f: getattr(C, f) for f in ("heads", "kv_rank", "head_dim", "rotary_dim", "value_dim")}
    | {field: value}
  )
  with pytest.raises(Refused, match=message):
    c.check()


@pytest.mark.parametrize("remat", ["attention", "qkv"])
def test_what_attention_finds_is_kept_once(remat, capsys):
  """As its kernel needs it, padded: the values in it are a slice of that."""
  layer, rows = C.make(D, Initializer(Normal(std=0.5), 2), jax.random.key(0)), 2 * FEW
  tokens = Tokens(jnp.tile(jnp.arange(rows), (B, 1)))
  loss = lambda layer, x: layer(x, tokens)[0].sum()
  policy = remats.policy(remats.KEPT[remat], ())
  print_saved_residuals(jax.checkpoint(loss, policy=policy), layer, jnp.ones((B, rows, D)))
  named = [line for line in capsys.readouterr().out.splitlines() if "named 'attention'" in line]
  sizes = [re.findall(r"\d+", line.partition("]")[0].partition("[")[2]) for line in named]
  wanted = [[B, C.heads, 1, rows, C.head_dim + C.rotary_dim], [B, C.heads, 1, rows]]
  assert sorted(map(len, sizes)) == [4, 5] and all([*map(int, s)] in wanted for s in sizes), named
