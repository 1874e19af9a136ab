"""Labelled text: rows of one text or a pair, `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`.

For fine-tuning an encoder (Devlin et al. 2018, arXiv:1810.04805, section 4). What is longer than a
row is cut at its end, of a pair the longer text first.

Dims: B rows, T position.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
from etils import epath

from bigtrain.config import Refused, config
from bigtrain.data.cache import root
from bigtrain.data.examples import ExampleData, Raw, Source
from bigtrain.data.masked import SPECIAL
from bigtrain.data.text_classes import Novels
from bigtrain.data.tokenizers import BPE, Tokenizer, TokenizerFile
from bigtrain.experiment import DataConfig

CHUNK = 4096  # Texts read at once to learn a tokenizer.


@config
class LabelledText(DataConfig):
  """A text, or a pair, in each row of `seq` tokens.

  Batches have `tokens`, `segments` (1 for text, 0 for padding) and `token_types` (1 for the second
  text of a pair and what ends it), all (B, T) int32, and `labels` and `weights`.
  """

  source: Source
  tokenizer: BPE | TokenizerFile = BPE(special=SPECIAL)  # BPE learns from the training texts.
  seq: int = 128  # Tokens of a row, T.
  cls: str = "[CLS]"  # As the tokenizer spells it.
  sep: str = "[SEP]"

  def make(self, seed: int) -> "Labelled":
    return Labelled(self, seed)

  def n_classes(self) -> int:
    return self.source.n_classes()

  def vocabulary(self) -> int | None:
    return self.tokenizer.size()

  def row_length(self) -> int:
    return self.seq

  def n_token_types(self) -> int:
    return self.source.texts_each()

  def read_tokenizer(self, path: epath.Path) -> Tokenizer | None:
    return self.tokenizer.read(path)

  def check(self) -> None:
    if self.seq < 8:
      raise Refused(f"data.seq is {self.seq}: a row has at least 8 tokens")
    if isinstance(self.tokenizer, BPE):
      for token in (self.cls, self.sep):
        if token not in self.tokenizer.special:
          raise Refused(f"data.tokenizer has no {token}; add it to tokenizer.special")

  def smoke(self) -> Self:
    source, tokenizer = self.source, self.tokenizer
    try:
      source.check()
      tokenizer.size()
    except Refused:  # The study's files are not on this machine, but its code can be tried.
      source, tokenizer = Novels(), BPE(vocab=512, special=(self.cls, self.sep))
    return dataclasses.replace(self, source=source, tokenizer=tokenizer, seq=min(self.seq, 64))


class Labelled(ExampleData):
  version = "text 2"

  def __init__(self, c: LabelledText, seed: int):
    row = (c.seq,), np.int32
    ExampleData.__init__(self, c.source, {"tokens": row, "segments": row, "token_types": row}, seed)
    self._config = c

  def problem(self, raw: Raw) -> str | None:
    texts = _texts(raw)
    if isinstance(texts, str):
      return texts
    if len(texts) > (most := self._config.source.texts_each()):
      return f"has {len(texts)} texts, more than the source's texts_each says, {most}"
    return None if all(text.strip() for text in texts) else "has an empty text"

  def inputs(self, raws: Sequence[Raw], keys: np.ndarray | None) -> dict[str, np.ndarray]:
    examples = [_texts(raw) for raw in raws]
    encoded = iter(self.tokenizer.encode_batch([text for texts in examples for text in texts]))
    batch = {k: np.zeros((len(raws), *shape), kind) for k, (shape, kind) in self._fields.items()}
    cls, sep = self.tokenizer.id_of(self._config.cls), self.tokenizer.id_of(self._config.sep)
    for i, texts in enumerate(examples):
      parts = cut([next(encoded) for _ in texts], self._config.seq - 1 - len(texts))
      row = np.concatenate([[cls], *(x for part in parts for x in (part, [sep]))])
      batch["tokens"][i, : len(row)] = row
      batch["segments"][i, : len(row)] = 1
      batch["token_types"][i, len(parts[0]) + 2 : len(row)] = 1
    return batch

  def digest(self) -> str:
    whole = f"{ExampleData.digest(self)} {self.tokenizer.digest}"
    return hashlib.sha256(whole.encode()).hexdigest()[:32]

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    from filelock import FileLock

    folder = root() / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "labelled.lock"):
      return self._config.tokenizer.make(ExampleData.digest(self), self._training_texts, folder)

  def tokenizer_json(self) -> str | None:
    return self.tokenizer.json

  def _training_texts(self) -> Iterator[str]:
    """Every training text."""
    split, at, _ = self._sides.train
    for start in range(0, len(at), CHUNK):
      for raw in split.read(at[start : start + CHUNK])[0]:
        yield from _texts(raw)


def _texts(raw: Raw) -> list[str] | str:
  """The text or two of an example, or what is wrong with it."""
  return json.loads(raw) if isinstance(raw, bytes) else "is no text"


def cut(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
  """One text or two, as much of their beginnings as there is room for, the longer cut first."""
  if len(texts) == 1:
    return [texts[0][:room]]
  a, b = texts
  mine = min(len(a), max(room - len(b), (room + 1) // 2))
  return [a[:mine], b[: room - mine]]
