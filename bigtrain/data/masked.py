"""Masked text: tokens to guess from both sides, with other ones masked each time an example comes.

Devlin et al. 2018, arXiv:1810.04805, section 3.1 and appendix A.1; dynamic masks are those of
RoBERTa (arXiv:1907.11692). What is masked is a pure function of the seed and the example's number.

Dims: B rows, T position.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Self

import numpy as np

from bigtrain.config import Refused, config
from bigtrain.data.rows import FIELDS, Rows
from bigtrain.data.shuffle import hashes, key_of
from bigtrain.data.text import Text, TextData
from bigtrain.data.tokenizers import BPE, Bytes, TokenizerFile

if TYPE_CHECKING:
  import jax

SPECIAL = ("[CLS]", "[SEP]", "[MASK]")
SMOKE_VOCAB = 512
# What a key is for: the last number on its path.
PIECE, CUT, REPLACED, OTHER, MASK, ACTION, TOKEN = range(7)
REACH = 1024  # Examples: their rows are from all over the split, and about to be read anyway.
HELD_OUT = 2**62  # In the place of the seed: masks of held-out rows are the same for every run.


@config
class MaskedText(TextData):
  """Rows of text in which a share of the tokens is masked.

  Each document of a row, or piece of one, is `[CLS] text [SEP]`: the two stand in the place of the
  end-of-text token before it and of its last token. With `next_sentence` a row is one pair instead:
  `[CLS] A [SEP] B [SEP]`, cut from one of the row's documents, B being one half of the time from
  another row. There are as many examples; texts shorter than a row take turns.
  """

  tokenizer: Bytes | BPE | TokenizerFile = BPE(special=SPECIAL)
  share: float = 0.15  # Of the tokens, to be guessed.
  masked: float = 0.8  # Of these, replaced by [MASK],
  random: float = 0.1  # and by any token; the rest stay as they are.
  whole_words: bool = False  # All tokens of a word are guessed together, or none.
  next_sentence: bool = False  # Pairs, and whether the second text follows the first.
  cls: str = "[CLS]"  # As the tokenizer spells it.
  sep: str = "[SEP]"
  mask: str = "[MASK]"

  def make(self, seed: int) -> "Masked":
    return Masked(self, seed)

  def n_token_types(self) -> int:
    return 1 + self.next_sentence

  def check(self) -> None:
    if self.seq < 8:
      raise Refused(f"data.seq is {self.seq}: a row of masked text has at least 8 tokens")
    if not 0 < self.share < 1:
      raise Refused(f"data.share is {self.share}: the share of tokens to guess, between 0 and 1")
    if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
      raise Refused(f"data.masked {self.masked} and random {self.random}: shares, at most 1 in all")
    if isinstance(self.tokenizer, Bytes):
      raise Refused(f"data.tokenizer: bytes have no {self.mask}; use BPE(special={SPECIAL})")
    if isinstance(self.tokenizer, BPE):
      for token in (self.cls, self.sep, self.mask):
        if token not in self.tokenizer.special:
          raise Refused(f"data.tokenizer has no {token}; add it to tokenizer.special")

  def smoke(self) -> Self:
    small = TextData.smoke(self)
    tokenizer = small.tokenizer
    if isinstance(tokenizer, Bytes):
      tokenizer = BPE(vocab=SMOKE_VOCAB, special=(self.cls, self.sep, self.mask))
    return dataclasses.replace(self, source=small.source, tokenizer=tokenizer, seq=small.seq)


class Masked(Text):
  """Prepared masked text. `weights` are 1 where a token is to be guessed, `targets` the originals.

  Batches have `token_types` (B, T) int32: 1 for the second text of a pair and what ends it; and
  with pairs `next_sentence` (B,) int32, as in BERT: 0 where it follows, 1 where it does not.
  """

  _config: MaskedText

  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    import jax

    spec = Text.spec(self, size)
    spec["token_types"] = jax.ShapeDtypeStruct((size, self._config.seq), np.int32)
    if self._config.next_sentence:
      spec["next_sentence"] = jax.ShapeDtypeStruct((size,), np.int32)
    return spec

  def batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    wanted = example + np.arange(size)[rows or slice(None)]
    return self._masked(self._train, wanted, self._seed, reach=REACH)

  def eval_batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    wanted = example + np.arange(size)[rows or slice(None)]
    # In their fixed order, rows nearby are often of one document.
    return self._masked(self._validation, wanted, HELD_OUT, reach=self._validation.count)

  def _masked(self, rows: Rows, examples, stream: int, reach: int) -> dict[str, np.ndarray]:
    keys = hashes(key_of(stream), examples)
    if self._config.next_sentence:
      batch = self._pairs(rows, examples, keys, reach)
    else:
      batch = self._documents(rows, examples)
    tokens_BT = batch["tokens"]
    fixed_BT = np.isin(tokens_BT, self._special[:2]) | (batch["segments"] == 0)
    starts_BT = self._starts[tokens_BT] if self._config.whole_words else np.ones_like(fixed_BT)
    chosen_BT = chosen(self._config.share, fixed_BT, starts_BT, hashes(keys, MASK))
    batch["targets"], batch["weights"] = tokens_BT, chosen_BT.astype(np.float32)
    batch["tokens"] = np.where(chosen_BT, self._replaced(tokens_BT, keys), tokens_BT)
    return batch

  def _documents(self, rows: Rows, examples: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of documents, each closed by the special tokens."""
    batch = rows(examples)
    cls, sep, _ = self._special
    segments_BT, first_BT = batch["segments"], batch["positions"] == 0
    following_BT = np.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    last_BT = segments_BT != following_BT
    real_BT = segments_BT > 0
    batch["tokens"] = np.where(last_BT & real_BT, sep, batch["tokens"])
    batch["tokens"] = np.where(first_BT & real_BT, cls, batch["tokens"])
    return batch | {"token_types": np.zeros_like(segments_BT)}

  def _pairs(self, rows: Rows, examples, keys, reach: int) -> dict[str, np.ndarray]:
    """Rows of one pair each; second texts are from at most `reach` examples further on."""
    shape = len(examples), self._config.seq
    kinds = FIELDS | {"token_types": np.int32}
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, kind) for name, kind in kinds.items()}
    batch["next_sentence"] = np.zeros(len(examples), np.int32)
    epochs, slots = np.divmod(examples, rows.count)
    away = 1 + _below(hashes(keys, OTHER), max(min(reach, rows.count - 1), 1))
    found, strange = rows(examples), rows(epochs * rows.count + (slots + away) % rows.count)
    cls, sep, _ = self._special
    for i in np.flatnonzero(found["segments"].any(axis=1)).tolist():
      text, key = self._piece(found, i, keys[i : i + 1]), keys[i : i + 1]
      cut = self._cut(text, key)
      follows = not hashes(key, REPLACED)[0] >> np.uint64(63)
      second = text[cut:]
      if not follows:  # As long, and from a word on: neither may give it away.
        other = self._piece(strange, i, key)
        begin = np.argmax(self._starts[other]) if len(other) else 0
        second = other[begin : begin + len(second)]
      line = np.concatenate([[cls], text[:cut], [sep], second, [sep]])
      n = len(line)
      batch["tokens"][i, :n], batch["segments"][i, :n] = line, 1
      batch["positions"][i, :n] = np.arange(n)
      batch["token_types"][i, cut + 2 : n] = 1
      batch["next_sentence"][i] = not follows
    return batch

  def _piece(self, found: dict[str, np.ndarray], i: int, key: np.ndarray) -> np.ndarray:
    """The text of one of the documents of a row, drawn from them."""
    segments_T = found["segments"][i]
    segment = 1 + _below(hashes(key, PIECE), segments_T.max())[0]
    return found["tokens"][i][segments_T == segment][1:]  # Without what is before the document.

  def _cut(self, text: np.ndarray, key: np.ndarray) -> int:
    """Where the second text of a pair begins: at a word, so that both have some if they can."""
    there = 1 + np.flatnonzero(self._starts[text[1:]])
    there = there[there <= self._config.seq - 4]
    if not len(there):
      return min(len(text), self._config.seq - 4) // 2
    return int(there[_below(hashes(key, CUT), len(there))[0]])

  def _replaced(self, tokens_BT: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What would stand in the place of each token if it were chosen."""
    places_T = np.arange(tokens_BT.shape[1])
    share_BT = hashes(hashes(keys, ACTION)[:, None], places_T) / 2.0**64
    any_BT = _below(hashes(hashes(keys, TOKEN)[:, None], places_T), self.vocab)
    kept_BT = np.where(share_BT < self._config.masked + self._config.random, any_BT, tokens_BT)
    kept_BT = np.where(share_BT < self._config.masked, self._special[2], kept_BT)
    return kept_BT.astype(np.int32)

  @functools.cached_property
  def _special(self) -> tuple[int, int, int]:
    c = self._config
    cls, sep, mask = (self.tokenizer.id_of(token) for token in (c.cls, c.sep, c.mask))
    return cls, sep, mask

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    return self.tokenizer.word_starts()

  def _rows(self, name: str, seed: int | None) -> Rows:
    c = self._config
    # A pair's row has three special tokens, where one position is the end-of-text's.
    seq = c.seq - 2 if c.next_sentence else c.seq
    return Rows(*self.prepared.split(name), seq=seq, packing=c.packing, seed=seed)


def chosen(
  share: float, fixed_BT: np.ndarray, starts_BT: np.ndarray, keys_B: np.ndarray
) -> np.ndarray:
  """Which tokens are guessed, (B, T) bool: whole words in random order while the share lasts.

  Of each row's n tokens that are not fixed, round(share * n) and at least one; with words of
  several tokens as many as fit, and at least one word.

  Args:
    share: of the tokens.
    fixed_BT: special tokens and padding, never chosen.
    starts_BT: where words begin; what is fixed also ends one.
    keys_B: uint64, of each row.
  """
  B, T = fixed_BT.shape
  begins_BT = starts_BT | fixed_BT | np.pad(fixed_BT[:, :-1], ((0, 0), (1, 0)))
  word_BT = np.cumsum(begins_BT, axis=1)
  # Bits that are the same for a word: sorting brings its tokens together, fixed ones to the end.
  bits_BT = hashes(keys_B[:, None], word_BT) >> np.uint64(1)
  order_BT = np.where(fixed_BT, np.uint64(2**64 - 1), bits_BT)
  sorted_BT = np.argsort(order_BT, axis=1, kind="stable")
  word_BT = np.take_along_axis(word_BT, sorted_BT, axis=1)
  last_BT = np.pad(np.diff(word_BT, axis=1) != 0, ((0, 0), (0, 1)), constant_values=True)
  # How many tokens there are up to the end of each token's word.
  until_BT = np.where(last_BT, np.arange(1, T + 1), T + 1)
  until_BT = np.minimum.accumulate(until_BT[:, ::-1], axis=1)[:, ::-1]
  wanted_B = np.rint(share * (~fixed_BT).sum(axis=1)).astype(int)
  taken_BT = until_BT <= np.maximum(wanted_B[:, None], until_BT[:, :1])
  found_BT = np.zeros((B, T), bool)
  np.put_along_axis(found_BT, sorted_BT, taken_BT, axis=1)
  return found_BT & ~fixed_BT


def _below(bits: np.ndarray, n: int) -> np.ndarray:
  """Integers in [0, n) from 64 bits."""
  return (bits % np.uint64(n)).astype(np.int64)
