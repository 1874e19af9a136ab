"""Logits of the presets, shrunk, equal those of `transformers`.

The makers are tools/golden/make_decoders.py and make_mixtral.py.
"""

import functools
import re

import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.interop.huggingface import load_weights
from bigtrain.models import presets
from bigtrain.models.moe import MoEConfig
from bigtrain.models.position import Learned, Llama3Scaling
from tests import golden

pytestmark = pytest.mark.smoke

TOLERANCE = 1e-4


def config(name):
  """The preset with the sizes of the golden file; all else is as published."""
  c = {
    "gpt2": presets.gpt2("124m"),
    "llama": presets.llama3("8b"),
    "qwen3": presets.qwen3("0.6b"),
    "mixtral": presets.mixtral("8x7b"),
    "qwen3_moe": presets.qwen3_moe("30b-a3b"),
  }[name]
  c.vocab, c.dim, c.layers, c.dtype = 64, 24, 2, "float32"
  block = c.pattern[0]
  block.attention.head_dim = 8
  if name == "gpt2":
    c.position = Learned(length=40)
    block.attention.heads, block.feed_forward.hidden = 3, 96
  else:
    block.attention.heads, block.attention.kv_heads, block.feed_forward.hidden = 4, 2, 40
  if isinstance(block.feed_forward, MoEConfig):
    block.feed_forward.experts, block.feed_forward.top_k = 4, 2
  if name == "llama":
    block.attention.rotary.theta = 10_000.0
    block.attention.rotary.scaling = Llama3Scaling(factor=8.0, original=128)
  return c


@functools.cache
def loaded(name):
  """(model, weights, tokens, logits of the reference)."""
  arrays = golden.read(name)
  tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
  shapes = jax.eval_shape(lambda: config(name).make(jax.random.key(0)))
  return load_weights(shapes, arrays), arrays, tokens, logits


@jax.jit
def run(model, tokens, positions=None, segments=None):
  return model(tokens, positions, segments)


def error(name, model):
  *_, tokens, expected = loaded(name)
  return np.abs(run(model, tokens) - expected).max()


NAMES = pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mixtral", "qwen3_moe"])


@NAMES
def test_logits_are_those_of_the_reference(name):
  assert error(name, loaded(name)[0]) < TOLERANCE


@NAMES
def test_one_changed_weight_of_any_parameter_is_noticed(name):
  model, _, tokens, _ = loaded(name)
  leaves, tree = jax.tree_util.tree_flatten_with_path(model)
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  for path, leaf in leaves.items():
    row = tokens[0, 0] if "embed" in path else 0  # A row that is looked up.
    other = leaves | {path: leaf.at[(row,) + (0,) * (leaf.ndim - 1)].add(0.05)}
    seen = error(name, jax.tree.unflatten(tree, other.values())) > TOLERANCE
    assert seen != ("k_bias" in path), path  # A bias of the keys adds the same to every score.


@pytest.mark.parametrize(
  ("name", "setting", "value", "dropped"),
  [
    ("llama", "rotary.theta", 20_000.0, "-"),
    ("llama", "rotary.scaling", None, "-"),
    ("qwen3", "qk_norm", None, "[qk]_norm"),
  ],
)
def test_a_changed_setting_is_noticed(name, setting, value, dropped):
  c = config(name)
  *owner, field = setting.split(".")
  setattr(functools.reduce(getattr, owner, c.pattern[0].attention), field, value)
  weights = {key: w for key, w in loaded(name)[1].items() if not re.search(dropped, key)}
  shapes = jax.eval_shape(lambda: c.make(jax.random.key(0)))
  assert error(name, load_weights(shapes, weights)) > 10 * TOLERANCE


@NAMES
def test_packed_documents_have_the_logits_of_each_alone(name):
  model, _, tokens, expected = loaded(name)
  first, second = 24, 16  # Tokens of two documents, each the beginning of a golden row.
  packed = np.concatenate([tokens[0, :first], tokens[1, :second]])[None]
  positions = np.concatenate([np.arange(first), np.arange(second)])[None]
  segments = np.repeat([1, 2], [first, second])[None]
  logits = run(model, packed, positions, segments)[0]
  np.testing.assert_allclose(logits[:first], expected[0, :first], atol=TOLERANCE)
  np.testing.assert_allclose(logits[first:], expected[1, :second], atol=TOLERANCE)
  mixed = run(model, packed, positions, np.ones_like(segments))[0]
  assert np.abs(mixed[first:] - expected[1, :second]).max() > 0.1


def test_weights_of_another_shape_or_family_are_refused():
  shapes = jax.eval_shape(lambda: config("llama").make(jax.random.key(0)))
  weights = loaded("llama")[1]
  less = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
  with pytest.raises(Refused, match=r"no layers\.1\.mlp\.up_proj\.weight"):
    load_weights(shapes, less)
  with pytest.raises(Refused, match=r"no place for extra\.weight"):
    load_weights(shapes, weights | {"extra.weight": np.zeros(2)})
  with pytest.raises(Refused, match=r"lm_head\.weight has shape"):
    load_weights(shapes, weights | {"lm_head.weight": np.zeros((65, 24))})
  with pytest.raises(Refused, match="of the model's family"):
    load_weights(shapes, loaded("gpt2")[1])
