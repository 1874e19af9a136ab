"""The stack against a python loop over its layers, and what must not change its values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.dropout import dropout
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.norm import LayerNormConfig
from bigtrain.models.position import Rotary
from bigtrain.models.remat import KEPT
from bigtrain.models.transformer import BlockConfig, Transformer, TransformerConfig
from tests.models.build import filled, normal, row

DIM = 16


def block(window=None, hidden=24, gated=True):
  attention = AttentionConfig(heads=4, kv_heads=2, window=window, rotary=Rotary())
  return BlockConfig(
    attention=attention, feed_forward=FeedForwardConfig(hidden=hidden, gated=gated)
  )


def config(**fields):
  """A dense block, then windowed and full ones in turn, of which the last windowed one is alone."""
  mixed = {
    "layers": 6,
    "first": (block(hidden=40, gated=False),),
    "pattern": (block(window=2), block()),
  }
  return TransformerConfig(**{"dim": DIM, "norm": LayerNormConfig()} | mixed | fields)


@functools.cache
def stack():
  return filled(lambda key: Transformer(config(), key))


def with_config(stack, **fields):
  """The same weights under another config."""
  leaves, tree = jax.tree.flatten(stack)
  c = dataclasses.replace(stack.c, **fields)
  other = jax.tree.structure(jax.eval_shape(lambda: Transformer(c, jax.random.key(0))))
  assert other.num_leaves == tree.num_leaves
  return jax.tree.unflatten(other, leaves)


@jax.jit
def run(stack, x, tokens):
  return stack(x, tokens)[0]


def layers(stack):
  """Each layer as a Block of its own, in the order in which they should be applied."""
  order = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 0)]
  for segment, pattern, repeat in order:
    yield jax.tree.map(lambda x, repeat=repeat: x[repeat], stack.segments[segment][pattern])


def test_segments_equal_a_loop_over_layers():
  x, tokens = normal(2, 7, DIM), row(7, 2, segments=[1, 1, 1, 1, 2, 2, 2])
  one = jax.jit(lambda layer, x: layer(x, tokens)[0])
  expected = x
  windows = []
  for layer in layers(stack()):
    windows.append(layer.attention.c.window)
    expected = one(layer, expected)
  assert windows == [None, 2, None, 2, None, 2]
  np.testing.assert_allclose(run(stack(), x, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unroll", [2, 8])
def test_unrolling_changes_no_value(unroll):
  x, tokens = normal(2, 7, DIM), row(7, 2)
  other = with_config(stack(), unroll=unroll)
  np.testing.assert_allclose(run(other, x, tokens), run(stack(), x, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_norms_stand_where_the_placement_says(placement):
  c = config(layers=1, first=(), norm_placement=placement)
  one = filled(lambda key: Transformer(c, key))
  layer = jax.tree.map(lambda x: x[0], one.segments[0][0])
  x, tokens = normal(2, 5, DIM), row(5, 2)

  @jax.jit
  def expected(layer, x):
    attend, feed = lambda x: layer.attention(x, tokens)[0], layer.feed_forward
    first, second = layer.attention_norm, layer.feed_forward_norm
    if placement == "pre":
      x = x + attend(first(x))
      return x + feed(second(x))
    if placement == "post":
      x = first(x + attend(x))
      return second(x + feed(x))
    x = x + layer.attention_out_norm(attend(first(x)))
    return x + layer.feed_forward_out_norm(feed(second(x)))

  np.testing.assert_allclose(run(one, x, tokens), expected(layer, x), rtol=1e-5, atol=1e-5)


@functools.cache
def small():
  c = config(layers=2, first=(), pattern=(block(window=2),))
  return filled(lambda key: Transformer(c, key))


def gradient(remat, **fields):
  """The gradient function, and the stack with that policy to apply it to."""
  x, tokens = normal(2, 7, DIM), row(7, 2)
  loss = lambda stack: (stack(x, tokens)[0] ** 2).mean()
  return jax.grad(loss), with_config(small(), remat=remat, **fields)


@functools.cache
def gradients(remat):
  grad, other = gradient(remat)
  return jax.tree.leaves(jax.jit(grad)(other))


@pytest.mark.parametrize("remat", KEPT)
def test_remat_changes_no_gradient(remat):
  for ours, plain in zip(gradients(remat), gradients("none"), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=2e-4, atol=1e-6)


def test_each_remat_policy_computes_less_again_than_the_one_before():
  def products(remat):
    grad, other = gradient(remat)
    return str(jax.make_jaxpr(grad)(other)).count("dot_general")

  counts = [products(remat) for remat in (*KEPT, "none")]
  assert counts == sorted(set(counts), reverse=True)


def test_what_is_computed_again_is_not_kept_and_changes_no_gradient():
  def of_both_layers(**fields):
    grad, other = gradient("products", **fields)
    text = str(jax.make_jaxpr(grad)(other))
    return [text.count(shape) for shape in ("f32[2,2,7,2,2,4]", "f32[2,2,7,2,4]")]

  (q_and_attention, k_and_v), (attention, k) = (
    of_both_layers(recompute=names) for names in ((), ("q", "v"))
  )
  assert attention == q_and_attention / 2 and k == k_and_v / 2
  grad, other = gradient("products", recompute=("q", "v"))
  for ours, plain in zip(jax.tree.leaves(jax.jit(grad)(other)), gradients("none"), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=2e-4, atol=1e-6)


def test_what_is_offloaded_waits_on_the_host_and_changes_no_gradient():
  names = ("input", "residual", "q", "up")
  grad, other = gradient("products", offload=names)
  text = str(jax.make_jaxpr(grad)(other))
  of_both_layers = {"input": "2,2,7,16", "q": "2,2,7,2,2,4", "up": "2,2,7,24"}
  assert all(f"f32<host>[{shape}]" in text for shape in of_both_layers.values())
  assert f"f32[{of_both_layers['input']}]" not in text  # It is not kept in both places.
  for ours, plain in zip(jax.tree.leaves(jax.jit(grad)(other)), gradients("none"), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=2e-4, atol=1e-6)


def test_dropout_has_its_rate_keeps_the_mean_and_follows_its_key():
  x, n = jnp.full((250, 400), 2.0), 100_000
  drop = lambda seed: np.asarray(dropout(x, 0.3, jax.random.key(seed)))
  found = drop(0)
  assert abs((found == 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
  np.testing.assert_allclose(found[found != 0], 2.0 / 0.7, rtol=1e-6)
  assert np.array_equal(found, drop(0)) and not np.array_equal(found, drop(1))
  assert dropout(x, 0.3, None) is x


def test_every_layer_drops_by_a_key_of_its_own():
  # With zeroed products only the biases pass: each layer adds 1 to each element, or drops it.
  c = config(layers=8, first=(), pattern=(block(),), dropout=0.5)
  c.pattern[0].attention.out_bias = True
  zeros = jax.tree.map(jnp.zeros_like, filled(lambda key: Transformer(c, key)))
  zeros.segments[0][0].attention.o_bias_D[...] += 1.0
  dropped = jax.jit(lambda stack, key: stack(jnp.zeros((4, 64, DIM)), row(64, 4), key)[0])
  found = np.asarray(dropped(zeros, jax.random.key(0)))
  # 8 draws of 0 or 2: variance 8, not the 64 of layers that drop the same elements.
  assert abs(found.mean() - 8) < 0.2 and abs(found.var() - 8) < 0.8
  assert np.array_equal(found, dropped(zeros, jax.random.key(0)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"layers": 1}, "1 layers leave none for the pattern after 1 first blocks; set layers to 2"),
    ({"pattern": ()}, "`pattern` is empty"),
    ({"dim": 18, "pattern": (block(),)}, "18 is not divisible by 4 heads"),
    ({"unroll": 0}, "unroll is 0"),
    ({"dropout": 1.0}, "dropout is 1.0; it is a rate"),
    ({"offload": ("q",)}, "offload has 'q', but remat='full' keeps input alone"),
    ({"remat": "none", "offload": ("q",)}, "nothing by name; set remat to 'qkv'"),
    (
      {"remat": "products", "recompute": ("received",)},
      "none of its blocks makes; .* residual, up",
    ),
  ],
)
def test_impossible_stacks_are_refused(fields, message):
  with pytest.raises(Refused, match=message):
    config(**fields).check()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"heads": 0}, "heads is 0; it must be positive"),
    ({"heads": 4, "kv_heads": 3}, "4 heads are not divisible by kv_heads=3"),
    ({"heads": 4, "head_dim": 5, "rotary": Rotary()}, "even head_dim, not 5"),
    ({"heads": 4, "window": 0}, "window is 0"),
  ],
)
def test_impossible_attention_is_refused(fields, message):
  with pytest.raises(Refused, match=message):
    AttentionConfig(**fields).check_dim(DIM)
