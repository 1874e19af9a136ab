"""Initial weights have the deviations that their config states."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.mesh import Mesh
from bigtrain.models import presets
from bigtrain.models.initial import FanIn, Initializer, Normal

LAYERS = 8


def config(init=None):
  """A preset too narrow to be of use, but with 30,000 weights in every product."""
  c = presets.gpt2("124m")
  c.vocab, c.dim, c.layers, c.position.length = 512, 64, LAYERS, 128
  c.pattern[0].attention.heads, c.pattern[0].attention.head_dim = 4, 16
  c.pattern[0].feed_forward.hidden = 256
  c.init = init or c.init
  return c


def made(c, key=0):
  return jax.jit(c.make)(jax.random.key(key))


@functools.cache
def gpt2():
  return made(config())


def deviation(parameter):
  return float(jnp.std(parameter[...]))


def test_gpt2_weights_have_their_deviation_and_residual_products_a_scaled_one():
  model = gpt2()
  block = model.transformer.segments[0][0]
  plain = [model.embed_VD, model.position_TD, block.feed_forward.up_DF]
  plain += [block.attention.q_DKGH, block.attention.k_DKH, block.attention.v_DKH]
  for parameter in plain:
    assert deviation(parameter) == pytest.approx(0.02, rel=0.03)
    assert abs(float(parameter[...].mean())) < 0.02 * 0.03
  for parameter in (block.attention.o_KGHD, block.feed_forward.down_FD):
    assert deviation(parameter) == pytest.approx(0.02 / np.sqrt(2 * LAYERS), rel=0.03)
  assert all(
    float(jnp.abs(b[...]).max()) == 0 for b in (block.attention.q_bias_KGH, model.norm.bias_D)
  )
  assert float(block.attention_norm.scale_D[...].min()) == 1.0


def test_no_two_weights_are_drawn_alike():
  block = gpt2().transformer.segments[0][0]
  rows = [
    np.asarray(x).reshape(LAYERS, -1)[:, :4096] for x in jax.tree.leaves(block) if x.size > 2**14
  ]
  rows = np.concatenate(rows)
  correlation = np.corrcoef(rows) - np.eye(len(rows))
  assert np.abs(correlation).max() < 6 / np.sqrt(4096)


@pytest.mark.parametrize(
  ("init", "plain", "residual"),
  [
    (Normal(std=0.5, residual="same"), 0.5, 0.5),
    (Normal(std=0.5, residual="zero"), 0.5, 0.0),
    (FanIn(scale=2.0), (2 / 64) ** 0.5, (2 / 256) ** 0.5),
    (FanIn(residual="scaled"), 1 / 8, 1 / 16 / np.sqrt(2 * LAYERS)),
  ],
)
def test_other_distributions(init, plain, residual):
  draw, sizes, key = Initializer(init, LAYERS), {"D": 64, "F": 256}, jax.random.key(1)
  assert deviation(draw.weight(key, "DF", sizes, "D")) == pytest.approx(plain, rel=0.03)
  assert deviation(draw.residual(key, "FD", sizes, "F")) == pytest.approx(residual, rel=0.03)


def test_any_mesh_draws_the_same_bits():
  with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()):
    sharded = made(config())
  chex.assert_trees_all_equal(gpt2(), jax.device_get(sharded))
  assert "tensor" in str(sharded.transformer.segments[0][0].attention.q_DKGH[...].sharding.spec)


def test_another_key_draws_other_weights():
  draw = lambda seed: Initializer(Normal(), 1).weight(jax.random.key(seed), "D", {"D": 64}, "D")
  assert np.array_equal(draw(0)[...], draw(0)[...])
  assert not np.array_equal(draw(0)[...], draw(1)[...])
