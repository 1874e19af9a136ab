"""The encoder and its heads; logits equal those of `transformers` (tools/golden/make_bert.py)."""

import functools

import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.interop.huggingface import load_some, load_weights
from bigtrain.models import presets
from bigtrain.models.count import count_parameters
from bigtrain.models.encoder import MaskedLMConfig, TextClassifierConfig
from bigtrain.models.position import Learned
from tests import golden
from tests.models.build import filled

pytestmark = pytest.mark.smoke

TOLERANCE = 1e-4
ROWS = ("tokens", "types", "mask", "logits", "next_sentence")


def config() -> MaskedLMConfig:
  """The preset with the sizes of the golden file; all else is as published."""
  c = presets.bert("base")
  c.vocab, c.dim, c.layers, c.dtype, c.position = 64, 24, 2, "float32", Learned(length=48)
  c.pattern[0].attention.heads, c.pattern[0].feed_forward.hidden = 3, 40
  return MaskedLMConfig(encoder=c, next_sentence=True)


@functools.cache
def loaded():
  """(model, weights, rows)."""
  arrays = golden.read("bert")
  rows = {name: arrays.pop(name) for name in ROWS}
  shapes = jax.eval_shape(lambda: config().make(jax.random.key(0)))
  return load_weights(shapes, arrays), arrays, rows


@jax.jit
def run(model, tokens, positions=None, segments=None, types=None):
  x_BTD = model.encoder(tokens, positions, segments, types)
  return model(tokens, positions, segments, types), model.next_sentence(x_BTD)


def error(model):
  _, _, rows = loaded()
  logits, following = run(model, rows["tokens"], None, rows["mask"], rows["types"])
  real = rows["mask"] == 1
  return max(
    np.abs(logits - rows["logits"])[real].max(), np.abs(following - rows["next_sentence"]).max()
  )


def test_logits_of_both_heads_are_those_of_the_reference_on_padded_pairs():
  assert error(loaded()[0]) < TOLERANCE


def test_one_changed_weight_of_any_parameter_is_noticed():
  model, _, rows = loaded()
  leaves, tree = jax.tree_util.tree_flatten_with_path(model)
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  for path, leaf in leaves.items():
    row = rows["tokens"][0, 0] if "embed_VD" in path else 0  # A row that is looked up.
    other = leaves | {path: leaf.at[(row,) + (0,) * (leaf.ndim - 1)].add(0.05)}
    seen = error(jax.tree.unflatten(tree, other.values())) > TOLERANCE
    assert seen != ("k_bias" in path), path  # A bias of the keys adds the same to every score.


def test_packed_documents_have_the_logits_of_each_alone_and_padding_changes_nothing():
  model, _, rows = loaded()
  tokens, n, m = rows["tokens"], 24, 13
  packed = np.concatenate([tokens[0, :n], tokens[1, :m], tokens[0, :3]])[None]
  positions = np.concatenate([np.arange(n), np.arange(m), np.zeros(3, int)])[None]
  segments = np.repeat([1, 2, 0], [n, m, 3])[None]
  logits = run(model, packed, positions, segments)[0][0]
  np.testing.assert_allclose(logits[:n], run(model, tokens[:1, :n])[0][0], atol=TOLERANCE)
  np.testing.assert_allclose(logits[n : n + m], run(model, tokens[1:, :m])[0][0], atol=TOLERANCE)
  mixed = run(model, packed, positions, np.ones_like(segments))[0][0]
  assert np.abs(mixed - logits)[:n].max() > 0.1


def test_every_token_sees_both_sides():
  model, _, rows = loaded()
  gradient = jax.grad(lambda w, t: w.encoder(rows["tokens"])[0, t].sum(), allow_int=True)
  for t in (0, 20, 39):
    moved = np.abs(gradient(model, t).encoder.position_TD[...]).max(axis=1)
    assert (moved[:40] > 0).all() and not moved[40:].any()


@pytest.mark.parametrize(
  ("size", "bare", "pretraining"),
  # Of bert-base-uncased and bert-large-uncased: BertModel with its pooler, and BertForPreTraining
  # (with the masked-token and next-sentence heads). 22,713,216 is all-MiniLM-L6-v2's.
  [
    ("base", 109_482_240, 110_106_428),
    ("large", 335_141_888, 336_226_108),
    ("minilm", 22_713_216, None),
  ],
)
def test_counts_are_those_of_the_released_weights(size, bare, pretraining):
  encoder = presets.bert(size)
  assert count_parameters(encoder) == bare
  if pretraining:
    assert count_parameters(MaskedLMConfig(encoder=encoder, next_sentence=True)) == pretraining
    pooler_and_head = encoder.dim * (encoder.dim + 1) + 2 * encoder.dim + 2
    assert count_parameters(MaskedLMConfig(encoder=encoder)) == pretraining - pooler_and_head
    classes = 3 * (encoder.dim + 1)
    assert count_parameters(TextClassifierConfig(encoder=encoder, classes=3)) == bare + classes


def test_a_classifier_takes_an_encoder_keeps_its_own_head_and_tells_what_is_left_over():
  c = TextClassifierConfig(encoder=config().encoder, classes=3)
  fresh = filled(c.make)
  model, unused = load_some(fresh, loaded()[1], lambda name: name.startswith("classes"))
  np.testing.assert_array_equal(model.classes_MC[...], fresh.classes_MC[...])
  assert len(unused) == 7 and all(name.startswith("cls.") for name in unused)
  _, _, rows = loaded()
  hidden = loaded()[0].encoder(rows["tokens"], None, rows["mask"], rows["types"])
  pooled = np.tanh(hidden[:, 0] @ model.encoder.pooler_DM + model.encoder.pooler_bias_M[...])
  expected = pooled @ fresh.classes_MC[...] + fresh.classes_bias_C[...]
  logits = model(rows["tokens"], None, rows["mask"], rows["types"])
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_dropout_needs_a_key_and_changes_with_it():
  c = TextClassifierConfig(encoder=config().encoder, classes=3)
  model, tokens = filled(c.make), loaded()[2]["tokens"]
  logits = [model(tokens, key=key) for key in (None, None, jax.random.key(0), jax.random.key(1))]
  np.testing.assert_array_equal(logits[0], logits[1])
  assert np.abs(logits[0] - logits[2]).max() > 1e-3 < np.abs(logits[2] - logits[3]).max()


def test_what_no_encoder_can_be_is_refused():
  c = config()
  c.check(), c.encoder.check()
  c.encoder.token_types = 1
  with pytest.raises(Refused, match=r"set encoder\.token_types to 2"):
    c.check()
  c.encoder.token_types = 0
  with pytest.raises(Refused, match="token_types is 0"):
    c.encoder.check()
  c.encoder.token_types, c.encoder.pattern[0].attention.causal = 2, True
  with pytest.raises(Refused, match=r"set attention\.causal to False"):
    c.encoder.check()
  with pytest.raises(Refused, match="at least 2"):
    TextClassifierConfig(encoder=config().encoder, classes=1).check()
