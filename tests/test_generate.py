"""Dims: B batch, T position, V vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import generate as room
from bigtrain.config import Refused
from bigtrain.data.spans import Spans
from bigtrain.data.tokenizers import ByteTokenizer
from bigtrain.generate import Sampling, draw, generate, generate_text
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.encoder_decoder import EncoderDecoderConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.position import Learned, Rotary
from bigtrain.models.transformer import BlockConfig

GREEDY = Sampling(temperature=0.0)
PROMPTS = [np.array([1, 2, 3]), np.array([5]), np.arange(11)]
LOGITS_V = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
N = 12
DRAWS = 4000


def block(window):
  attention = AttentionConfig(heads=4, kv_heads=2, window=window, rotary=Rotary())
  return BlockConfig(attention=attention, feed_forward=FeedForwardConfig(hidden=64))


def built(vocab=64):
  """A model whose next token is far from certain, and far from the same everywhere."""
  c = LanguageModelConfig(
    vocab=vocab, dim=32, layers=2, pattern=(block(4), block(None)), position=Learned(length=32)
  )
  scaled = lambda key: jax.tree.map(lambda w: 8 * w if w.ndim > 2 else w, c.make(key))
  return jax.jit(scaled)(jax.random.key(0))


model = functools.cache(built)


def drawn(temperature=1.0, top_k=None, top_p=None, logits_V=LOGITS_V):
  """How often each token is drawn."""
  keys_B = jax.random.split(jax.random.key(3), DRAWS)
  logits_BV = jnp.tile(logits_V, (DRAWS, 1))
  tokens_B = jax.jit(draw, static_argnums=3)(logits_BV, keys_B, temperature, top_k, top_p)
  return np.bincount(tokens_B, minlength=len(logits_V)) / DRAWS


def test_greedy_tokens_are_the_argmax_of_the_whole_forward_pass_at_every_step():
  found = generate(model(), PROMPTS, N, GREEDY)
  forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))
  for prompt, tokens in zip(PROMPTS, found, strict=True):
    text = np.append(prompt, tokens)
    # Causal: one pass over the finished text holds the logits of every step.
    logits_TV = np.asarray(forward(model(), np.pad(text, (0, 23 - len(text)))[None]))[0]
    assert tokens.tolist() == logits_TV[len(prompt) - 1 : len(text) - 1].argmax(-1).tolist()
  assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
  assert all(len(set(tokens)) > 3 for tokens in found)


def test_a_prompt_alone_continues_as_beside_a_longer_one():
  beside = generate(model(), PROMPTS, N, GREEDY)
  for i in range(2):
    [alone] = generate(model(), PROMPTS[i : i + 1], N, GREEDY)
    assert alone.tolist() == beside[i].tolist()


def test_a_mesh_changes_no_token():
  sampling = Sampling(top_k=20, top_p=0.9)
  plain = generate(model(), PROMPTS, N, sampling)
  with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()):
    on_mesh = generate(built(), PROMPTS, N, sampling)
  assert [a.tolist() for a in on_mesh] == [a.tolist() for a in plain]


def test_the_seed_and_the_number_of_a_row_decide_its_text():
  sampling = Sampling(temperature=1.0)
  three = [PROMPTS[0]] * 3
  once, again = (generate(model(), three, N, sampling) for _ in range(2))
  assert [a.tolist() for a in once] == [a.tolist() for a in again]
  assert len({tuple(a) for a in once}) == 3
  [other] = generate(model(), three[:1], N, Sampling(temperature=1.0, seed=1))
  [alone] = generate(model(), three[:1], N, sampling)
  _, among_others, _ = generate(model(), [PROMPTS[2], PROMPTS[0], PROMPTS[1]], N, sampling)
  assert other.tolist() != once[0].tolist() == alone.tolist()
  assert among_others.tolist() == once[1].tolist()


def test_a_row_ends_before_the_stop_token():
  whole = generate(model(), PROMPTS, N, GREEDY)
  stop = int(whole[0][4])
  cuts = [np.append(np.flatnonzero(row == stop), N)[0] for row in whole]
  ended = generate(model(), PROMPTS, N, GREEDY, stop=stop)
  assert [a.tolist() for a in ended] == [w[:n].tolist() for w, n in zip(whole, cuts, strict=True)]
  assert cuts[0] <= 4


def test_the_loop_ends_with_the_last_row(monkeypatch):
  [whole] = generate(model(), PROMPTS[:1], N, GREEDY)
  stop = int(whole[4])
  steps = []
  count = lambda *a: (jax.debug.callback(lambda: steps.append(1)), draw(*a))[1]
  monkeypatch.setattr(room, "draw", count)
  room._sample.clear_cache()
  generate(model(), PROMPTS[:1], N, GREEDY, stop=stop)
  jax.effects_barrier()
  room._sample.clear_cache()
  assert len(steps) == np.flatnonzero(whole == stop)[0] + 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sharpens_or_flattens_the_distribution(temperature):
  wanted = np.exp(LOGITS_V.astype(np.float64) / temperature)
  np.testing.assert_allclose(drawn(temperature), wanted / wanted.sum(), atol=0.03)


@pytest.mark.parametrize(
  "settings, kept",
  [
    ({"top_k": 1}, [1]),
    ({"top_k": 3}, [1, 3, 4]),
    ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.39}, [1]),
    ({"top_p": 0.41}, [1, 3]),
    ({"top_p": 0.8}, [1, 3, 4]),
    ({"top_p": 0.9}, [1, 2, 3, 4]),
    ({"top_p": 1e-9}, [1]),
    ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # 0.65 of 0.85 is more than 0.7.
    ({"temperature": 4.0, "top_p": 0.41}, [1, 3]),
    ({"temperature": 0.25, "top_p": 0.8}, [1]),  # 0.4**4 is 0.81 of the sum.
  ],
)
def test_only_the_likeliest_tokens_are_drawn_in_their_proportions(settings, kept):
  power = 1 / settings.get("temperature", 1.0)
  wanted = np.zeros(5)
  wanted[kept] = np.exp(LOGITS_V[kept].astype(np.float64) * power)
  found = drawn(**settings)
  assert np.flatnonzero(found).tolist() == kept
  np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.03)


def test_of_equally_likely_tokens_top_k_keeps_k():
  assert np.flatnonzero(drawn(top_k=2, logits_V=np.zeros(5, np.float32))).tolist() == [0, 1]


def test_huge_logits_and_a_tiny_temperature_draw_the_likeliest_token():
  logits_V = np.array([1e30, 3e30, 2e30], np.float32)
  assert drawn(temperature=1e-9, top_p=0.5, logits_V=logits_V).tolist() == [0, 1, 0]


def test_text_is_continued_as_the_beginning_of_a_document():
  tokenizer = ByteTokenizer()
  bytes_model = model(vocab=257)
  sampling = Sampling(temperature=1.0, seed=4)
  texts = generate_text(bytes_model, tokenizer, ["", "né"], 10, sampling)
  ids = [np.array([256]), np.array([256, *"né".encode()])]
  tokens = generate(bytes_model, ids, 10, sampling, stop=256)
  assert texts == [bytes(t.tolist()).decode(errors="replace") for t in tokens]
  assert all(texts)


@pytest.mark.parametrize(
  "prompts, length, sampling, message",
  [
    ([[1], []], 5, GREEDY, "prompt 1 has no tokens"),
    ([[1, 64]], 5, GREEDY, "prompt 0 has token 64, but the model knows 0 to 63"),
    ([[1, -1]], 5, GREEDY, "prompt 0 has token -1"),
    ([[1] * 5], 29, GREEDY, "5 tokens, and 29 more do not fit .* 32 positions; sample at most 28"),
    ([[1] * 40], 1, GREEDY, "shorten the prompt to 32"),
    ([[1]], 0, GREEDY, "0 tokens are to be sampled"),
    ([[1]], 5, Sampling(temperature=-1.0), "temperature is -1.0"),
    ([[1]], 5, Sampling(top_k=0), "top_k is 0"),
    ([[1]], 5, Sampling(top_p=0.0), "top_p is 0.0"),
    ([[1]], 5, Sampling(top_p=1.5), "top_p is 1.5"),
  ],
)
def test_what_cannot_be_sampled_is_refused_before_any_work(
  monkeypatch, prompts, length, sampling, message
):
  monkeypatch.setattr(room, "_sample", None)
  with pytest.raises(Refused, match=message):
    generate(model(), [np.array(p, np.int32) for p in prompts], length, sampling)


def test_a_classifier_is_told_apart_from_what_generates_text():
  c = MLPConfig(inputs=2, hidden=(3,), classes=2)
  with pytest.raises(Refused, match="no text can be sampled from a MLP"):
    generate_text(c.make(jax.random.key(0)), ByteTokenizer(), ["It"], 3, GREEDY)


def test_every_position_of_the_model_can_be_used():
  [tokens] = generate(model(), [np.arange(5)], 28, GREEDY)
  assert len(tokens) == 28


def test_an_encoder_decoder_reads_a_whole_text_and_answers():
  attention = AttentionConfig(heads=4, causal=False)
  pattern = (BlockConfig(attention=attention, feed_forward=FeedForwardConfig(hidden=64)),)
  c = EncoderDecoderConfig(vocab=384, dim=32, layers=1, pattern=pattern, start=7)
  scaled = lambda key: jax.tree.map(lambda w: 4 * w if w.ndim > 2 else w, c.make(key))
  answers = jax.jit(scaled)(jax.random.key(0))
  tokenizer = Spans(sentinels=20).spelling(ByteTokenizer())
  prompts, sampling = ["a<extra_id_0>b", "né"], Sampling(temperature=1.0, seed=4)
  texts = generate_text(answers, tokenizer, prompts, 10, sampling)
  ids = [np.array([97, 276, 98, 256]), np.array([*"né".encode(), 256])]
  tokens = generate(answers, ids, 10, sampling, stop=256)
  assert texts == [tokenizer.decode(t) for t in tokens] and all(texts)
  assert not any(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
