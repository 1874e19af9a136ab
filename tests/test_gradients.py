"""Back-propagation through every block equals finite differences, in float64.

That it can be compared so closely also shows that no cast inside lowers the precision of what
enters. Dims: B batch, T position, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bigtrain.kernels.cross_entropy import cross_entropy
from bigtrain.models.activation import FUNCTIONS
from bigtrain.models.attention import AttentionConfig, Memory
from bigtrain.models.encoder_decoder import EncoderDecoderConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer, Normal
from bigtrain.models.norm import LayerNormConfig, RMSNormConfig
from bigtrain.models.position import RelativeBuckets, Rotary, lookup
from bigtrain.models.transformer import BlockConfig, Transformer, TransformerConfig
from tests.models.build import filled, row

B, T, D, V = 2, 5, 8, 7
INIT = Initializer(Normal(), layers=1)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape):
  return jnp.asarray(np.random.default_rng(1).standard_normal(shape))


def block(make):
  """A module of `make(key)` in float64, every parameter drawn."""
  return jax.tree.map(lambda w: w.astype(jnp.float64), filled(make))


def check(function, *args):
  """The directional derivative of a weighted sum, along a random direction of all arguments."""
  out = jax.eval_shape(function, *args)
  assert out.dtype == jnp.float64
  weights = jnp.asarray(np.random.default_rng(2).standard_normal(out.shape))
  scalar = jax.jit(lambda *args: (weights * function(*args)).sum())
  check_grads(scalar, args, order=1, modes=("rev",), atol=1e-7, rtol=1e-7, eps=1e-6)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"kv_heads": 2},
    {"causal": False},
    {"window": 2},
    {"rotary": Rotary()},
    {"qk_norm": RMSNormConfig()},
    {"qk_norm": LayerNormConfig()},
    {"softcap": 2.0},
    {"scaled": False},
    {"bias": True, "out_bias": True},
    {"kv_heads": 2, "rotary": Rotary(), "qk_norm": RMSNormConfig(), "softcap": 2.0, "window": 3},
  ],
  ids=str,
)
def test_attention(options):
  c = AttentionConfig(heads=4, head_dim=4, **options)
  tokens = row(T, B, segments=[1, 1, 1, 2, 2])
  attention = block(lambda key: c.make(D, INIT, key))
  check(lambda attention, x_BTD: attention(x_BTD, tokens)[0], attention, draw(B, T, D))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", (*FUNCTIONS, "prelu"))
def test_feed_forward(activation, gated):
  c = FeedForwardConfig(hidden=12, activation=activation, gated=gated, bias=True)
  check(lambda m, x_BTD: m(x_BTD), block(lambda key: c.make(D, INIT, key)), draw(B, T, D))


@pytest.mark.parametrize("c", [RMSNormConfig(), RMSNormConfig(scale=False), LayerNormConfig()])
def test_norms(c):
  check(lambda norm, x_BTD: norm(x_BTD), block(lambda key: c.make(D)), draw(B, T, D))


def test_the_lookup_of_an_embedding():
  ids_BT = np.random.default_rng(0).integers(0, V, (B, T))
  embed_VD = block(lambda key: INIT.weight(key, "VD", {"V": V, "D": D}, fan_in="D"))
  check(lambda table_VD: lookup(table_VD, ids_BT, jnp.float64), embed_VD)


@pytest.mark.parametrize("chunk", [None, 4])
def test_cross_entropy(chunk):
  r = np.random.default_rng(0)
  targets_BT, weights_BT = r.integers(0, V, (B, T)), r.random((B, T))
  settings = {"chunk": chunk, "z_loss": 0.1, "label_smoothing": 0.2}
  loss = lambda x_BTD, table_VD: cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, **settings)
  check(lambda *args: loss(*args)[0], draw(B, T, D), draw(V, D))


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_a_stack_of_blocks_that_recomputes(placement):
  attention = AttentionConfig(heads=2, rotary=Rotary())
  pattern = (BlockConfig(attention=attention, feed_forward=FeedForwardConfig(hidden=12)),)
  c = TransformerConfig(dim=D, layers=2, pattern=pattern, norm_placement=placement)
  stack = block(lambda key: Transformer(c, key))
  tokens = row(T, B)
  check(lambda stack, x_BTD: stack(x_BTD, tokens)[0], stack, draw(B, T, D))


def test_an_encoder_decoder_with_relative_positions():
  attention = AttentionConfig(heads=2, kv_heads=1, causal=False, scaled=False)
  feed_forward = FeedForwardConfig(hidden=12, gated=True)
  c = EncoderDecoderConfig(
    vocab=V,
    dim=D,
    layers=2,
    pattern=(BlockConfig(attention=attention, feed_forward=feed_forward),),
    relative=RelativeBuckets(buckets=4, distance=4),
    dtype="float32",
  )
  model = block(c.make)
  source, target = row(T, B, segments=[1, 1, 1, 2, 2]), row(T - 1, B, segments=[1, 2, 2, 0])

  def decoded(encoder, decoder, x_BSD, y_BTD):
    memory = Memory(source, encoder(x_BSD, source)[0])
    return decoder(y_BTD, target, memory=memory)[0]

  check(decoded, model.encoder, model.decoder, draw(B, T, D), draw(B, T - 1, D))
