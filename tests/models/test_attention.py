"""Attention against loops over heads in float64, and masks written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.kernels.attention import Call, Form, Tokens, attend, visible
from bigtrain.kernels.attention.plain import by_column
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.initial import Initializer, Normal
from bigtrain.models.norm import RMSNormConfig
from bigtrain.sharding import act
from tests.models.build import filled, normal, row

D = 24


def attention(**fields):
  c = AttentionConfig(**{"heads": 4, "head_dim": 8} | fields)
  return filled(lambda key: c.make(D, Initializer(Normal(), 1), key))


@jax.jit
def apply(module, x, tokens):
  return module(x, tokens)[0]


def reference(module, x, mask):
  """One head after the other; `mask` (T, S) is of row 0."""
  c = module.c
  weight = lambda name: np.float64(getattr(module, name)[...])
  x, out = np.float64(x[0]), 0.0
  for head in range(c.heads):
    kv, group = divmod(head, c.heads // (c.kv_heads or c.heads))
    q = x @ weight("q_DKGH")[:, kv, group]
    k, v = x @ weight("k_DKH")[:, kv], x @ weight("v_DKH")[:, kv]
    if c.bias:
      q, k = q + weight("q_bias_KGH")[kv, group], k + weight("k_bias_KH")[kv]
      v = v + weight("v_bias_KH")[kv]
    if c.qk_norm is not None:
      unit = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + c.qk_norm.eps)
      q = unit(q) * np.float64(module.q_norm.scale_D[...])
      k = unit(k) * np.float64(module.k_norm.scale_D[...])
    score = q @ k.T / np.sqrt(q.shape[-1])
    if c.softcap is not None:
      score = c.softcap * np.tanh(score / c.softcap)
    prob = np.where(mask, np.exp(score), 0.0)
    out = out + prob / prob.sum(-1, keepdims=True) @ v @ weight("o_KGHD")[kv, group]
  return out + (weight("o_bias_D") if c.out_bias else 0.0)


CAUSAL = np.tri(6, dtype=bool)
BAND = np.array(
  [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [0, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 0, 0],
    [0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 1, 1],
  ],
  bool,
)
PACKED = np.array(
  [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0],
    [0, 0, 1, 1, 0, 0],
    [0, 0, 1, 1, 1, 0],
    [0, 0, 0, 0, 0, 1],
  ],
  bool,
)


@pytest.mark.parametrize(
  ("fields", "mask"),
  [
    ({}, CAUSAL),
    ({"kv_heads": 2, "bias": True, "out_bias": True}, CAUSAL),
    ({"kv_heads": 1, "qk_norm": RMSNormConfig(eps=0.1)}, CAUSAL),
    ({"causal": False}, np.ones((6, 6), bool)),
    ({"window": 2, "softcap": 0.7}, BAND),
  ],
  ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_values_equal_loops_over_heads(fields, mask):
  module, x = attention(**fields), normal(2, 6, D)
  np.testing.assert_allclose(apply(module, x, row(6, 2))[0], reference(module, x, mask), atol=2e-5)


def test_packed_documents_do_not_see_each_other():
  module, x = attention(), normal(1, 6, D)
  tokens = row(6, segments=[1, 1, 2, 2, 2, 3])
  assert tokens.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
  np.testing.assert_allclose(apply(module, x, tokens)[0], reference(module, x, PACKED), atol=2e-5)


def test_masks_are_those_written_by_hand():
  segments = row(6, segments=[1, 1, 2, 2, 2, 3])
  see = lambda tokens, *form: np.asarray(visible(tokens, tokens, Form(*form)))[0]
  assert np.array_equal(see(row(6), True, None), CAUSAL)
  assert np.array_equal(see(row(6), True, 2), BAND)
  assert np.array_equal(see(row(6), False, 2), BAND | BAND.T)
  assert np.array_equal(see(segments, True, None), PACKED)
  assert np.array_equal(see(segments, True, 2), PACKED & BAND)
  padded = Tokens(np.array([[-1, -1, 0, 1, 2, 3]]))
  assert np.array_equal(see(padded, True, None)[2:, 2:], CAUSAL[2:, 2:])
  assert not see(padded, True, None)[:, :2].any()


def test_grouped_queries_equal_repeated_key_value_heads():
  grouped, x = attention(kv_heads=2), normal(2, 6, D)
  whole = attention()
  whole.q_DKGH[...] = grouped.q_DKGH[...].reshape(D, 4, 1, 8)
  whole.k_DKH[...] = jnp.repeat(grouped.k_DKH[...], 2, axis=1)
  whole.v_DKH[...] = jnp.repeat(grouped.v_DKH[...], 2, axis=1)
  whole.o_KGHD[...] = grouped.o_KGHD[...].reshape(4, 1, 8, D)
  one, other = apply(grouped, x, row(6, 2)), apply(whole, x, row(6, 2))
  np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite_in_value_and_gradient():
  q, k, v = normal(1, 3, 2, 1, 4), normal(1, 3, 2, 4, seed=2), normal(1, 3, 2, 4, seed=3)
  empty = Tokens(np.full((1, 3), -1))
  total = lambda *x: attend(Call(*x, empty, empty, Form(causal=False))).sum()
  value, grads = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)
  assert all(np.isfinite(x).all() for x in (value, *grads))


def test_dropped_attention_keeps_its_mean():
  q, k = np.zeros((8, 16, 2, 1, 4), np.float32), np.zeros((8, 16, 2, 4), np.float32)
  v, tokens, form = np.ones_like(k), Tokens(np.zeros((8, 16), np.int32)), Form(causal=False)
  drop = lambda key: attend(Call(q, k, v, tokens, tokens, form, dropout=0.25, key=key))
  out = jax.jit(drop)(jax.random.key(3))
  # Each of 256 sums of 16 weights of 1/16, kept with 3/4 and scaled by 4/3.
  assert abs(float(out.mean()) - 1) < 4 * np.sqrt(1 / 3 / 16 / 256)
  assert abs(float(out.std()) - np.sqrt(1 / 3 / 16)) < 0.03


def test_a_single_head_keeps_its_sharding():
  """An axis of size 1 still stands in the type: jax 0.12 loses it in a bare reshape."""
  with jax.set_mesh(Mesh(data=8, fsdp=1).make()):
    place = lambda dims: jax.sharding.NamedSharding(jax.sharding.get_mesh(), act(dims))
    shape = lambda dims, *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=place(dims))
    q, k = shape("BTKGH", 8, 6, 1, 1, 4), shape("BSKH", 8, 6, 1, 4)
    tokens = Tokens(jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=place("BT")))
    run = lambda q, k, tokens: attend(Call(q, k, k, tokens, tokens, Form(causal=True)))
    assert jax.eval_shape(run, q, k, tokens).sharding.spec == act("BTKGH")


def test_a_bias_is_added_by_the_distance_of_columns():
  T, S, K, G = 4, 6, 2, 3
  bias = normal(K, G, T + S - 1)
  found = np.asarray(by_column(jnp.asarray(bias), T))
  assert found.shape == (K, G, T, S)
  for t in range(T):
    for s in range(S):
      np.testing.assert_array_equal(found[:, :, t, s], bias[:, :, s - t + T - 1])
  q, k, v = normal(2, T, K, G, 8), normal(2, S, K, 8, seed=2), normal(2, S, K, 8, seed=3)
  at = lambda segments: Tokens(np.zeros((2, len(segments)), np.int32), np.array([segments] * 2))
  queries, keys = at([1, 2, 1, 2]), at([2, 1, 2, 1, 1, 2])
  mask = queries.segments[:, :, None] == keys.segments[:, None]
  arrays = map(jnp.asarray, (q, k, v))
  out = attend(Call(*arrays, queries, keys, Form(causal=False), bias_KGP=jnp.asarray(bias)))
  score = np.einsum("btkgh,bskh->bkgts", np.float64(q), k) + found
  exp = np.exp(score) * mask[:, None, None]
  expected = np.einsum("bkgts,bskh->btkgh", exp / exp.sum(-1, keepdims=True), v)
  np.testing.assert_allclose(out, expected, atol=1e-5)
