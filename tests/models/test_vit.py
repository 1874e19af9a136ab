"""The vision transformer: its published sizes, another library's logits, and what is its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.annotations import check_types
from bigtrain.config import Refused
from bigtrain.interop.huggingface import load_weights
from bigtrain.kernels.attention import Tokens
from bigtrain.models import presets
from bigtrain.models.count import count_parameters
from bigtrain.models.initial import Mup
from bigtrain.models.norm import LayerNormConfig
from bigtrain.models.vit import AttentionPoolConfig, patches, waves
from tests import golden
from tests.models.build import filled, normal

TOLERANCE = 1e-4
# With class token and 1,000 classes: the sizes of timm's vit_*_patch*_224 (in its results table
# 5.72, 22.05, 86.57, 304.33 and, of vit_giant_patch14_224, 1012.61 million).
PUBLISHED = {
  "ti/16": 5_717_416,
  "s/16": 22_050_664,
  "b/16": 86_567_656,
  "l/16": 304_326_632,
  "g/14": 1_012_611_432,
}


POOL = AttentionPoolConfig(heads=3, hidden=40)


def tiny(**fields):
  """The preset with the sizes of the golden file."""
  c = presets.vit("b/16")
  c.pattern[0].attention.heads, c.pattern[0].feed_forward.hidden = 3, 40
  sizes = {"dim": 24, "layers": 2, "image": 12, "channels": 2, "patch": 4, "classes": 7}
  # The reference's class of models adds less to the variance than timm's, 1e-6.
  norm = LayerNormConfig(eps=1e-12)
  return dataclasses.replace(c, **sizes | {"dtype": "float32", "norm": norm} | fields)


def test_every_preset_has_the_parameters_that_are_published():
  assert set(PUBLISHED) == set(presets.VIT)
  for size, count in PUBLISHED.items():
    c = presets.vit(size)
    check_types(c)
    c.check()
    assert count_parameters(c) == count
  # Multiply-adds of an image: 17.56 G by the same table, attention's products included.
  assert presets.vit("b/16").flops() / 6 == pytest.approx(17.56e9, rel=0.01)


@functools.cache
def loaded():
  """(model, images, logits of the reference)."""
  arrays = golden.read("vit")
  images, logits = arrays.pop("images"), arrays.pop("logits")
  shapes = jax.eval_shape(lambda: tiny().make(jax.random.key(0)))
  return load_weights(shapes, arrays), images, logits


@jax.jit
def run(model, images):
  return model(images)


def error(model):
  _, images, logits = loaded()
  return np.abs(run(model, images) - logits).max()


@pytest.mark.smoke
def test_logits_are_those_of_the_reference():
  assert error(loaded()[0]) < TOLERANCE


def test_one_changed_weight_of_any_parameter_is_noticed():
  leaves, tree = jax.tree_util.tree_flatten_with_path(loaded()[0])
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  for path, leaf in leaves.items():
    other = leaves | {path: leaf.at[(0,) * leaf.ndim].add(0.05)}
    seen = error(jax.tree.unflatten(tree, other.values())) > TOLERANCE
    assert seen != ("k_bias" in path), path  # A bias of the keys adds the same to every score.


def test_patches_go_from_left_to_right_and_top_to_bottom():
  images = normal(2, 6, 6, 3)
  got = np.asarray(patches(images, 2))
  assert got.shape == (2, 9, 12)
  np.testing.assert_array_equal(got[1, 5], images[1, 2:4, 4:6].reshape(-1))


def test_fixed_positions_are_sines_and_cosines_of_column_and_row():
  freq = 10_000.0 ** -(np.arange(3) / 2)
  row, column = 2, 3
  expected = [f(x * freq) for x in (column, row) for f in (np.sin, np.cos)]
  np.testing.assert_allclose(waves(4, 12)[row * 4 + column], np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", POOL])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_patches_have_places_and_images_of_a_batch_do_not_meet(pool, position):
  model = filled(tiny(pool=pool, position=position).make)
  images = normal(2, 12, 12, 2)
  logits = np.asarray(run(model, images))
  turned = np.asarray(run(model, np.ascontiguousarray(images[:, ::-1])))
  assert np.abs(logits - turned).max() > 1e-2
  np.testing.assert_allclose(run(model, images[1:]), logits[1:], atol=1e-5)


def test_attention_pooling_equals_its_formula():
  pool = filled(tiny(pool=POOL).make).pool
  a, x_BTD = pool.attention, normal(2, 9, 24)
  w = lambda p: np.float64(p[...])
  q_KH = np.einsum("d,dkgh->kh", w(pool.query_QD)[0], w(a.q_DKGH)) + w(a.q_bias_KGH)[:, 0]
  k_BTKH = np.einsum("btd,dkh->btkh", x_BTD, w(a.k_DKH)) + w(a.k_bias_KH)
  v_BTKH = np.einsum("btd,dkh->btkh", x_BTD, w(a.v_DKH)) + w(a.v_bias_KH)
  score_BTK = np.exp(np.einsum("kh,btkh->btk", q_KH, k_BTKH) / np.sqrt(8))
  y_BKH = np.einsum("btk,btkh->bkh", score_BTK / score_BTK.sum(1, keepdims=True), v_BTKH)
  y_BD = np.einsum("bkh,khd->bd", y_BKH, w(a.o_KGHD)[:, 0]) + w(a.o_bias_D)
  expected = y_BD + pool.feed_forward(pool.norm(jnp.float32(y_BD)[:, None]))[:, 0]
  np.testing.assert_allclose(pool(x_BTD), expected, atol=1e-4)


def test_a_network_of_no_units_behind_attention_pooling_is_refused():
  with pytest.raises(Refused, match="hidden is 0"):
    AttentionPoolConfig(heads=3, hidden=0).check()


def test_the_products_of_attention_pooling_count_as_its_weights_on_what_they_see():
  T, dim, hidden = 9, 24, 40
  whole, mean = (tiny(pool=pool).flops() for pool in (POOL, "mean"))
  # The query's product and the output's are of one token, those of keys and values of all.
  products = 2 * dim**2 + 2 * T * dim**2 + 2 * dim * hidden
  assert whole - mean == 6 * products + 2 * 6 * T * dim


def test_stochastic_depth_drops_whole_branches_by_example_and_more_of_them_with_depth():
  c = tiny(drop_path=0.5, layers=3)
  block = c.pattern[0]
  block.attention.out_bias = False
  model = filled(c.make)
  images = np.repeat(normal(1, 12, 12, 2), 400, axis=0)
  x_BTD = model._embedded(images)
  key = jax.random.key(0)
  layers = jax.tree.map(lambda w: w[0], model.transformer.segments[0][0])
  tokens = jnp.zeros((400, 10), jnp.int32)
  apply = jax.jit(lambda rate: layers(x_BTD, Tokens(tokens), key, None, rate)[0])
  whole = apply(0.0)
  np.testing.assert_allclose(whole, layers(x_BTD, Tokens(tokens))[0], atol=1e-5)
  # Two branches, each left out or not: four different results among equal images.
  for rate in (0.5, 0.25):
    rows = np.asarray(apply(rate)).reshape(400, -1)
    assert len(np.unique(rows.round(3), axis=0)) == 4
    untouched = np.isclose(rows, np.asarray(x_BTD).reshape(400, -1), atol=1e-4).all(1).mean()
    assert untouched == pytest.approx(rate**2, abs=0.07)
  first = np.asarray(jax.jit(model.logits)(images, key))
  assert len(np.unique(first.round(4), axis=0)) > 4
  np.testing.assert_array_equal(model(images[:1]), model.logits(images[:1], None))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"image": 13}, "take images of 12 or 16"),
    ({"dim": 18, "position": "sincos"}, "divisible by 4, not 18"),
    ({"classes": 0}, "classes is 0"),
    ({"pool": AttentionPoolConfig(heads=5, hidden=40)}, "dim 24 is not divisible by 5 heads"),
    ({"drop_path": 1.0}, "drop_path is 1.0"),
    (
      {"pool": AttentionPoolConfig(heads=2, hidden=40), "init": Mup(base=12, head_dim=4)},
      "heads of one width, not of 8 and 12",
    ),
    (
      {"pool": AttentionPoolConfig(heads=3, hidden=41), "init": Mup(base=12, head_dim=4)},
      "hidden is 41, so at the base of 12 it would be 20.5",
    ),
  ],
)
def test_impossible_values_are_refused(fields, message):
  with pytest.raises(Refused, match=message):
    tiny(**fields).check()


def test_causal_blocks_and_images_of_another_size_are_refused():
  c = tiny()
  c.pattern[0].attention.causal = True
  with pytest.raises(Refused, match="causal=False"):
    c.check()
  with pytest.raises(Refused, match=r"12x12 pixels and 2 channels, not \(12, 12, 3\)"):
    loaded()[0](np.zeros((1, 12, 12, 3), np.float32))
