"""Sampling from a language model with a key-value cache: one compiled program for a whole call.

The prompts stand right-aligned in one batch, which the model reads at once: a decoder into its
cache, an encoder-decoder by its encoder. Then a loop feeds each row its newest token and draws the
next, until every row has ended.

Dims: B batch, T prompt position, N sampled position, V vocabulary, C candidate tokens.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.encoder_decoder import EncoderDecoder
from bigtrain.models.language_model import LanguageModel

Model = LanguageModel | EncoderDecoder


@config
class Sampling:
  """How the next token is drawn: from the tempered distribution, cut by top_k, then by top_p."""

  temperature: float = 0.8  # Divides the logits; 0 takes the likeliest token.
  top_k: int | None = None  # Only the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833).
  # Only the likeliest tokens that hold this probability together, the one that reaches it included
  # (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751).
  top_p: float | None = None
  seed: int = 0  # Another one gives other tokens.

  def check(self) -> None:
    if self.temperature < 0:
      raise Refused(
        f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more"
      )
    if self.top_k is not None and self.top_k < 1:
      raise Refused(f"top_k is {self.top_k}; it must be 1 or more, or None for all tokens")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise Refused(f"top_p is {self.top_p}; it must be above 0 and at most 1, or None for no cut")


def generate_text(
  model: Model,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  length: int,
  sampling: Sampling,
) -> list[str]:
  """The text that follows each prompt: at most `length` tokens, or up to the document's end.

  A prompt is the beginning of a document, so end-of-text precedes it as in training. To an
  encoder-decoder it is a whole text, which end-of-text follows, and the text is its answer.

  Raises:
    Refused: as `generate`.
  """
  ids = _encoded(model, tokenizer, prompts)
  found = generate(model, ids, length, sampling, stop=tokenizer.eot)
  if not model.continues:
    return [tokenizer.decode(row) for row in found]
  whole = [tokenizer.decode(np.append(a, b)) for a, b in zip(ids, found, strict=True)]
  # Decoded together: some tokenizers drop the space in front of a text's first word.
  return [text.removeprefix(tokenizer.decode(a)) for a, text in zip(ids, whole, strict=True)]


def check_text(model: Model, tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> None:
  """Refuses prompts and a length that `generate_text` would refuse."""
  _check(model, _encoded(model, tokenizer, prompts), length)


def _encoded(model: Model, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
  """The ids of each prompt, after end-of-text or, for an encoder, before it."""
  if not hasattr(model, "continues"):  # A classifier, or a bare encoder.
    raise Refused(f"no text can be sampled from a {type(model).__name__}")
  end, texts = [np.int32(tokenizer.eot)], tokenizer.encode_batch(list(prompts))
  return [np.concatenate([end, x] if model.continues else [x, end]) for x in texts]


def generate(
  model: Model,
  prompts: Sequence[np.ndarray],
  length: int,
  sampling: Sampling,
  stop: int | None = None,
) -> list[np.ndarray]:
  """The tokens that follow each prompt: at most `length`, ending before `stop`.

  The random numbers of a row depend on the seed and its number in the call alone, not on the other
  rows. Under a mesh, the one in force must be that of the parameters; every process makes the same
  call and gets all rows.

  Args:
    model: its parameters may be sharded.
    prompts: (T,) token ids of each row, at least one.
    length: tokens to sample.
    sampling: how they are drawn.
    stop: the token that ends a row.

  Raises:
    Refused: an empty prompt, a token that the model does not know, more positions than it has, or
      impossible settings.
  """
  sampling.check()
  _check(model, prompts, length)
  if not prompts:
    return []
  shards = sharding.axis_size("B")
  rows = -(-len(prompts) // shards) * shards  # The mesh must divide the batch.
  tokens_BT, lengths_B = _right_aligned(prompts, rows)
  choice = Choice(sampling.temperature or None, sampling.top_p, np.uint32(sampling.seed % 2**32))
  end = np.int32(-1 if stop is None else stop)
  sampled_BN = _sample(
    model, tokens_BT, lengths_B, choice, end, top_k=sampling.top_k, length=length
  )
  found = np.asarray(sampled_BN)[: len(prompts)]
  return [row[: np.append(np.flatnonzero(row == stop), length)[0]] for row in found]


def _check(model: Model, prompts: Sequence[np.ndarray], length: int) -> None:
  if length < 1:
    raise Refused(f"{length} tokens are to be sampled; give a length of 1 or more")
  vocab, positions = model.c.vocab, model.c.longest_row()
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise Refused(f"prompt {i} has no tokens; begin it with end-of-text, as documents do")
    if min(prompt) < 0 or max(prompt) >= vocab:
      raise Refused(
        f"prompt {i} has token {max(prompt) if min(prompt) >= 0 else min(prompt)}, but the model "
        f"knows 0 to {vocab - 1}; use the tokenizer that it was trained with"
      )
    if positions is not None and len(prompt) + length - 1 > positions:
      room = positions + 1 - len(prompt)
      remedy = f"sample at most {room}" if room > 0 else f"shorten the prompt to {positions}"
      raise Refused(
        f"prompt {i} has {len(prompt)} tokens, and {length} more do not fit into the model's "
        f"{positions} positions; {remedy}"
      )


def _right_aligned(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
  """The prompts as (B, T) int32 and their lengths (B,); rows that only fill up have length 0.

  T - 1, what goes into the cache at once, is a power of two, so that few programs are compiled.
  """
  longest = max(map(len, prompts))
  tokens_BT = np.zeros((rows, 1 + (1 << max(longest - 2, 0).bit_length())), np.int32)
  lengths_B = np.zeros(rows, np.int32)
  for i, prompt in enumerate(prompts):
    tokens_BT[i, -len(prompt) :] = prompt
    lengths_B[i] = len(prompt)
  return tokens_BT, lengths_B


class Choice(NamedTuple):
  """What of a Sampling may change without compiling anew."""

  temperature: float | None  # None takes the likeliest token.
  top_p: float | None
  seed: np.uint32


@functools.partial(jax.jit, static_argnames=("top_k", "length"))
def _sample(
  model, tokens_BT, lengths_B, choice: Choice, stop, *, top_k: int | None, length: int
) -> jax.Array:
  """Sampled tokens (B, N) int32, replicated; what stands after a row's `stop` means nothing."""
  B, T = tokens_BT.shape
  batch = sharding.act("BT")
  positions_BT = jnp.maximum(jnp.arange(T) - T + lengths_B[:, None], -1)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(choice.seed), jnp.arange(B))

  def unfinished(carry):
    n, _, ended_B, *_ = carry
    return (n < length) & ~ended_B.all()

  def step(carry):
    n, token_B, ended_B, sampled_BN, cache = carry
    here = (_placed(x_B[:, None], batch) for x_B in (token_B, first_B + n))
    logits_BTV, cache = model.decode(*here, cache)
    logits_BV = _placed(logits_BTV[:, 0], sharding.spec({}, "BV"))
    keys_now_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)
    token_B = draw(logits_BV, keys_now_B, choice.temperature, top_k, choice.top_p)
    sampled_BN = sampled_BN.at[:, n].set(token_B)
    return n + 1, token_B, ended_B | (token_B == stop), sampled_BN, cache

  rows = (_placed(x_BT, batch) for x_BT in (tokens_BT, positions_BT))
  *first, cache = model.begin(*rows, length)
  token_B, first_B = (_placed(x_B, sharding.spec({}, "B")) for x_B in first)
  sampled_BN = jnp.zeros((B, length), jnp.int32)
  begin = (jnp.int32(0), token_B, lengths_B == 0, sampled_BN, cache)
  return jax.lax.while_loop(unfinished, step, begin)[3]


def draw(logits_BV, keys_B, temperature, top_k: int | None, top_p) -> jax.Array:
  """One token for each row, (B,) int32; the likeliest where `temperature` is None.

  Args:
    logits_BV: float32.
    keys_B: a random key for each row.
    temperature: above 0, or None.
    top_k: candidates kept; of equally likely ones those with smaller ids.
    top_p: the candidates kept are the fewest that hold this share of the probability that top_k
      left.
  """
  if temperature is None:
    return logits_BV.argmax(axis=-1).astype(jnp.int32)
  logits_BC = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
  ids_BC = None
  if top_k is not None or top_p is not None:
    V = logits_BC.shape[-1]
    logits_BC, ids_BC = jax.lax.top_k(logits_BC, min(top_k or V, V))
  if top_p is not None:
    prob_BC = jax.nn.softmax(logits_BC)
    before_BC = jnp.cumsum(prob_BC, axis=-1) - prob_BC
    logits_BC = jnp.where(before_BC < top_p, logits_BC, -jnp.inf)
  choice_B = jax.vmap(jax.random.categorical)(keys_B, logits_BC)
  if ids_BC is not None:
    choice_B = jnp.take_along_axis(ids_BC, choice_B[:, None], axis=-1)[:, 0]
  return choice_B.astype(jnp.int32)


def _placed(x, spec) -> jax.Array:
  return x if spec is None else jax.sharding.reshard(x, spec)
