"""Text with gaps, and what stood in them: other spans are taken out each time an example comes.

Raffel et al. 2020, arXiv:1910.10683, section 3.1.4, as in t5/data/preprocessors.py of
github.com/google-research/text-to-text-transfer-transformer: a row of text has its gaps marked by
sentinels, the row to predict has each sentinel followed by its span. Which spans these are is a
pure function of the seed and the example's number.

Dims: B rows, S source position, T target position, N tokens of a text.
"""

import functools
import re
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from bigtrain.config import Refused, config
from bigtrain.data.masked import HELD_OUT
from bigtrain.data.rows import Rows
from bigtrain.data.shuffle import hashes, key_of
from bigtrain.data.text import Text, TextData
from bigtrain.data.tokenizers import BPE, Bytes, Tokenizer, TokenizerFile

if TYPE_CHECKING:
  import jax

SENTINEL = re.compile(r"<extra_id_(\d+)>")  # As the tokenizers of T5 spell them, and texts here.
KINDS = dict.fromkeys(
  ("tokens", "positions", "segments", "targets", "target_positions", "target_segments"), np.int32
)


@config
class Spans(TextData):
  """Rows of `seq` tokens for an encoder, of which spans are gaps, and rows of these spans.

  Documents follow one another in a row with end-of-text before each, and a gap may reach from one
  into the next, as in T5: both rows are then full. They end with end-of-text.
  """

  noise: float = 0.15  # Share of the tokens that is taken out.
  span: float = 3.0  # Tokens of a span, on average.
  # Sentinels where the tokenizer has no "<extra_id_N>": as many ids above its own, the first the
  # highest.
  sentinels: int = 100

  def make(self, seed: int) -> "SpanData":
    return SpanData(self, seed)

  def vocabulary(self) -> int | None:
    return self.tokenizer.size() + (0 if self._has_own() else self.sentinels)

  def read_tokenizer(self, path: epath.Path) -> Tokenizer | None:
    found = self.tokenizer.read(path)
    return None if found is None else self.spelling(found)

  def spelling(self, tokenizer: Tokenizer) -> "SpanTokenizer":
    """A tokenizer that also knows the sentinels."""
    if not self._has_own():
      return SpanTokenizer(tokenizer, tokenizer.vocab + np.arange(self.sentinels)[::-1])
    _, spans = counts(self.lengths()[0], self.noise, self.span)
    return SpanTokenizer(tokenizer, [tokenizer.id_of(f"<extra_id_{i}>") for i in range(spans)])

  def lengths(self) -> tuple[int, int]:
    """Tokens of the whole text of a row, and of its targets: the most with which the source fits.

    (T5's random_spans_helper.)
    """

    def of(n: int) -> tuple[int, int]:
      noise, spans = counts(n, self.noise, self.span)
      return n - noise + spans + 1, noise + spans + 1

    n = self.seq - 1
    while of(n + 1)[0] <= self.seq:
      n += 1
    while of(n)[0] > self.seq:  # Short rows of short spans have more sentinels than tokens.
      n -= 1
    return n, of(n)[1]

  def check(self) -> None:
    if self.seq < 8:
      raise Refused(f"data.seq is {self.seq}: a row with gaps has at least 8 tokens")
    if not 0 < self.noise < 1:
      raise Refused(f"data.noise is {self.noise}: the share that is taken out, between 0 and 1")
    if self.span < 1:
      raise Refused(f"data.span is {self.span}: a span has 1 token or more")
    if isinstance(self.tokenizer, BPE):
      own = sum(1 for token in self.tokenizer.special if SENTINEL.fullmatch(token))
      there, where = own or self.sentinels, "tokenizer.special" if own else "data.sentinels"
    elif isinstance(self.tokenizer, Bytes):
      there, where = self.sentinels, "data.sentinels"
    else:
      return  # The file tells, when it is opened.
    _, spans = counts(self.lengths()[0], self.noise, self.span)
    if spans > there:
      raise Refused(
        f"rows of {self.seq} tokens have {spans} spans but there are {there} sentinels; give "
        f"{where} {spans}, or a longer data.span"
      )

  def _has_own(self) -> bool:
    """Whether the tokenizer has sentinels."""
    if isinstance(self.tokenizer, TokenizerFile):
      found = self.tokenizer.read(epath.Path(self.tokenizer.path).expanduser())
      try:
        return found is not None and found.id_of("<extra_id_0>") >= 0
      except Refused:
        return False
    return isinstance(self.tokenizer, BPE) and "<extra_id_0>" in self.tokenizer.special


class SpanData(Text):
  """Prepared text with gaps.

  Batches have, (B, S) each, `tokens`, `positions` and `segments`: 1, and 0 for padding; and, (B, T)
  each, `targets`, `weights` (1 for all that is no padding), `target_positions` and
  `target_segments`.
  """

  _config: Spans

  @functools.cached_property
  def tokenizer(self) -> "SpanTokenizer":
    return self._config.spelling(self.prepared.tokenizer)

  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    import jax

    _, T = self._config.lengths()
    shape = lambda name: (size, T if name.startswith("target") else self._config.seq)
    spec = {name: jax.ShapeDtypeStruct(shape(name), kind) for name, kind in KINDS.items()}
    return spec | {"weights": jax.ShapeDtypeStruct((size, T), np.float32)}

  def batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    return self._with_gaps(self._train, example + np.arange(size)[rows or slice(None)], self._seed)

  def eval_batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    wanted = example + np.arange(size)[rows or slice(None)]
    return self._with_gaps(self._validation, wanted, HELD_OUT)

  def _with_gaps(self, rows: Rows, examples: np.ndarray, stream: int) -> dict[str, np.ndarray]:
    found = rows(examples)
    keys = hashes(key_of(stream, 0), examples)
    batch = {k: np.zeros(s.shape, s.dtype) for k, s in self.spec(len(examples)).items()}
    for i, n in enumerate((found["segments"] > 0).sum(axis=1).tolist()):
      if n:
        text, end = found["tokens"][i, :n], [self.tokenizer.eot]
        gaps = gaps_of(n, self._config.noise, self._config.span, keys[i : i + 1])
        for name, start, line in zip(
          ("tokens", "targets"),
          ("", "target_"),
          split(text, gaps, self.tokenizer.sentinels),
          strict=True,
        ):
          line = np.append(line, end)
          batch[name][i, : len(line)] = line
          batch[f"{start}positions"][i, : len(line)] = np.arange(len(line))
          batch[f"{start}segments"][i, : len(line)] = 1
    return batch | {"weights": (batch["target_segments"] > 0).astype(np.float32)}

  def _rows(self, name: str, seed: int | None) -> Rows:
    c = self._config
    return Rows(*self.prepared.split(name), seq=c.lengths()[0], packing=c.packing, seed=seed)


def counts(n: int, noise: float, span: float) -> tuple[int, int]:
  """How many of n tokens are taken out, and how many spans they form: of either at least one."""
  taken = min(max(round(n * noise), 1), n - 1)
  return taken, min(max(round(taken / span), 1), n - taken)


def gaps_of(n: int, noise: float, span: float, key: np.ndarray) -> np.ndarray:
  """Which of n tokens are taken out, (N,) bool (T5's random_spans_noise_mask).

  Kept and taken tokens are each cut into as many parts at random places, and the parts take turns,
  a kept one first.
  """
  taken, spans = counts(n, noise, span)
  kept_parts = _parts(n - taken, spans, hashes(key, 0))
  taken_parts = _parts(taken, spans, hashes(key, 1))
  turns = np.stack([kept_parts, taken_parts], axis=1).ravel()
  return np.repeat(np.tile([False, True], spans), turns)


def split(text: np.ndarray, gaps: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, ...]:
  """A text with a sentinel in the place of each gap, and each sentinel with what stood there."""
  begins = gaps & ~np.pad(gaps[:-1], (1, 0))
  nth = np.cumsum(begins)
  source = np.where(begins, sentinels[nth - 1], text)[begins | ~gaps]
  spans = np.insert(text[gaps], np.flatnonzero(begins[gaps]), sentinels[: nth[-1]])
  return source, spans


def _parts(n: int, parts: int, key: np.ndarray) -> np.ndarray:
  """The lengths of `parts` parts of n things, at least 1 each; all ways to cut are as likely."""
  cuts = 1 + np.sort(np.argsort(hashes(key, np.arange(n - 1)))[: parts - 1])
  return np.diff(cuts, prepend=0, append=n)


class SpanTokenizer:
  """A tokenizer for texts in which sentinels are spelt "<extra_id_0>", "<extra_id_1>" and so on.

  Args:
    tokenizer: of the text between them.
    sentinels: the id of each.
  """

  def __init__(self, tokenizer: Tokenizer, sentinels):
    self._tokenizer, self.sentinels = tokenizer, np.asarray(sentinels, np.int32)
    self.vocab = max(tokenizer.vocab, int(self.sentinels.max()) + 1)
    self.eot, self.digest, self.json = tokenizer.eot, tokenizer.digest, tokenizer.json

  def encode(self, text: str) -> np.ndarray:
    first, *parts = SENTINEL.split(text)
    pieces = [self._tokenizer.encode(first)]
    for number, piece in zip(parts[::2], parts[1::2], strict=True):
      if int(number) >= len(self.sentinels):
        most = len(self.sentinels) - 1
        raise Refused(f"there is no <extra_id_{number}>: sentinels are <extra_id_0> to {most}")
      pieces += [self.sentinels[[int(number)]], self._tokenizer.encode(piece)]
    return np.concatenate(pieces)

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids) -> str:
    ids = np.asarray(ids)
    at = np.flatnonzero(np.isin(ids, self.sentinels))
    numbers = {int(id): n for n, id in enumerate(self.sentinels)}
    first, *pieces = np.split(ids, at)
    spelt = (f"<extra_id_{numbers[int(p[0])]}>{self._tokenizer.decode(p[1:])}" for p in pieces)
    return self._tokenizer.decode(first) + "".join(spelt)

  def byte_lengths(self) -> np.ndarray:
    lengths = self._tokenizer.byte_lengths()
    return np.pad(lengths, (0, self.vocab - len(lengths)))

  def id_of(self, token: str) -> int:
    sentinel = SENTINEL.fullmatch(token)
    return int(self.encode(token)[-1]) if sentinel else self._tokenizer.id_of(token)

  def word_starts(self) -> np.ndarray:
    starts = self._tokenizer.word_starts()
    return np.pad(starts, (0, self.vocab - len(starts)))


def joined(prompt: str, text: str) -> str:
  """A prompt with the text that was sampled for it: in its gaps if it has any, else behind it.

  A gap is a sentinel; the text says behind the same one what stood there.
  """
  if not SENTINEL.search(prompt):
    return prompt + text
  parts = SENTINEL.split(text)
  spans = dict(zip(parts[1::2], parts[2::2], strict=True))
  return SENTINEL.sub(lambda gap: spans.get(gap[1], gap[0]), prompt)
