"""The language model: cached decoding, embeddings, logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.kernels.attention import Tokens
from bigtrain.models import presets
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Learned, Sinusoidal
from tests.models.build import filled
from tests.models.test_transformer import block

VOCAB, LENGTH = 32, 12


def config(**fields):
  default = {"vocab": VOCAB, "dim": 16, "layers": 2, "dtype": "float32"}
  return LanguageModelConfig(**default | {"pattern": (block(window=3), block())} | fields)


CONFIGS = {
  "rotary": config(tied=False),
  "learned": config(position=Learned(length=LENGTH)),
  "sinusoidal": config(position=Sinusoidal(), norm_placement="post"),
  "shifted": config(shift=True),
}


@functools.cache
def model(name):
  return filled(CONFIGS[name].make)


def tokens(batch=2):
  return np.random.default_rng(5).integers(VOCAB, size=(batch, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("name", ["rotary", "learned", "shifted"])
def test_cached_decoding_equals_the_full_forward_also_behind_padding(name):
  full = jax.jit(lambda model, tokens: model(tokens))(model(name), tokens())
  decode = jax.jit(lambda model, *inputs: model.decode(*inputs))
  # Row 1 is shorter by three, which are padding on its left; both end at the same slot.
  pad, prompt = np.array([0, 3]), 6
  rows = np.stack(
    [
      np.concatenate([np.zeros(n, np.int32), row[: LENGTH - n]])
      for n, row in zip(pad, tokens(), strict=True)
    ]
  )
  positions = np.maximum(np.arange(LENGTH) - pad[:, None], -1)
  cache = model(name).cache(2, LENGTH)
  parts = [slice(0, prompt)] + [slice(i, i + 1) for i in range(prompt, LENGTH)]
  logits = []
  for part in parts:
    found, cache = decode(model(name), rows[:, part], positions[:, part], cache)
    logits.append(found)
  logits = np.concatenate(logits, axis=1)
  np.testing.assert_allclose(logits[0], full[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits[1, 3:], full[1, : LENGTH - 3], rtol=1e-4, atol=1e-4)
  assert int(cache.length) == LENGTH


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_token_changes_no_earlier_logit_and_packing_is_as_being_alone(name):
  run = jax.jit(lambda model, *inputs: model(*inputs))
  first, second = tokens()[0, :7], tokens()[1, :5]
  packed = np.concatenate([first, second])[None]
  segments = np.repeat([1, 2], [7, 5])[None]
  positions = np.concatenate([np.arange(7), np.arange(5)])[None]
  logits = run(model(name), packed, positions, segments)[0]
  alone = run(model(name), tokens())
  np.testing.assert_allclose(logits[:7], alone[0, :7], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits[7:], alone[1, :5], rtol=1e-4, atol=1e-4)


def test_a_shift_adds_a_share_of_the_embedding_before_within_a_document():
  shifted = model("shifted")
  positions, segments = np.tile([0, 1, 2, 0, 1], (2, 1)), np.tile([1, 1, 1, 2, 2], (2, 1))
  embed_BTD = np.asarray(shifted.embed_VD[...])[tokens()[:, :5]]
  before_BTD = np.roll(embed_BTD, 1, axis=1)
  before_BTD[:, [0, 3]] = 0  # Where documents begin.
  expected = embed_BTD + np.asarray(shifted.shift_scale_D[...]) * before_BTD
  found, _ = shifted._shifted(jnp.asarray(embed_BTD), Tokens(positions, segments), None)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_logits_are_float32_and_activations_of_the_compute_dtype():
  c = config(dtype="bfloat16")
  shape = lambda f: jax.eval_shape(lambda: f(c.make(jax.random.key(0)), jnp.asarray(tokens())))
  assert shape(lambda model, tokens: model.hidden(tokens)).dtype == jnp.bfloat16
  assert shape(lambda model, tokens: model(tokens)).dtype == jnp.float32
  assert shape(lambda model, tokens: model.output_VD(model.hidden(tokens))).dtype == jnp.bfloat16


def test_what_the_mesh_must_divide_is_told_by_letter():
  c = presets.llama3("8b")
  assert c.dims() == {
    "dim": ("D", 4096),
    "pattern.0.attention.kv_heads": ("K", 8),
    "pattern.0.feed_forward.hidden": ("F", 14336),
    "vocab": ("V", 128256),
  }
  assert c.vocabulary() == 128256 and c.longest_row() is None
  assert presets.gpt2("124m").longest_row() == 1024
