"""Text: documents of a source, tokenised, packed into rows. The config and the prepared data."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from etils import epath

from bigtrain.config import Refused, config
from bigtrain.console import human
from bigtrain.data.cache import Prepared, prepare
from bigtrain.data.pack import Packing
from bigtrain.data.rows import FIELDS, Rows
from bigtrain.data.sources import Austen, Files, PreparedText
from bigtrain.data.tokenizers import BPE, Bytes, Tokenizer, TokenizerFile
from bigtrain.experiment import Data, DataConfig

if TYPE_CHECKING:
  import jax

SMOKE_BYTES = 2**24  # Of input that --smoke still prepares; for more it takes the embedded corpus.
SMOKE_SEQ = 128
PADDED = 2**16  # Tokens of a row that may be longer than all of the text, to try out a few words.


@config
class TextData(DataConfig):
  """Documents packed into rows of `seq` tokens."""

  source: Austen | Files | PreparedText = Austen()
  tokenizer: Bytes | BPE | TokenizerFile = Bytes()
  seq: int = 256  # Tokens of a row, T.
  packing: Packing = "best_fit"  # Documents whole where they fit; `concat` cuts where a row ends.

  def make(self, seed: int) -> "Text":
    return Text(self, seed)

  def vocabulary(self) -> int | None:
    return self.tokenizer.size()

  def row_length(self) -> int:
    return self.seq

  def read_tokenizer(self, path: epath.Path) -> Tokenizer | None:
    return self.tokenizer.read(path)

  def check(self) -> None:
    if self.seq < 1:
      raise Refused(f"data.seq is {self.seq}: a row has at least 1 token")

  def smoke(self) -> Self:
    source, tokenizer = self.source, self.tokenizer
    try:
      large = sum(path.stat().st_size for path, _ in source.inputs()) > SMOKE_BYTES
      tokenizer.size()
    except Refused:  # The study's files are not on this machine, but its code can be tried.
      large, tokenizer = True, Bytes()
    source = Austen() if large else source
    seq = min(self.seq, SMOKE_SEQ)
    return dataclasses.replace(self, seq=seq, source=source, tokenizer=tokenizer)


def check_tokenizers(parts: Iterable[DataConfig], whole: str) -> None:
  """Refuses text whose numbers would stand for other tokens in another part."""
  texts = [data for data in parts if isinstance(data, TextData)]
  if len({(t.tokenizer, isinstance(t.tokenizer, BPE) and t.source) for t in texts}) > 1:
    raise Refused(
      f"{whole} have different tokenizers (BPE learns one from each source): give all the same "
      "tokenizer.json by TokenizerFile"
    )


class Text(Data):
  """Prepared text. Nothing is read before it is needed: `spec` works without the data."""

  def __init__(self, c: TextData, seed: int):
    self._config = c
    self._seed = seed

  @functools.cached_property
  def prepared(self) -> Prepared:
    """The tokenised source; building it may take long, and happens once for ever."""
    return prepare(self._config.source, self._config.tokenizer)

  def digest(self) -> str:
    """Of the files' contents, how they are read, and the tokenizer; not of where they lie."""
    return self.prepared.folder.name

  def about(self) -> str:
    train, held_out = (self.manifest["splits"][name] for name in ("train", "validation"))
    tokens = f"{human(train['positions'])} tokens of {human(train['documents'])} documents"
    return f"{tokens}, {human(held_out['positions'])} held out"

  def kept_out(self) -> str | None:
    return self.prepared.kept_out()

  @property
  def tokenizer(self) -> Tokenizer:
    return self.prepared.tokenizer

  def tokenizer_json(self) -> str | None:
    return self.tokenizer.json

  @property
  def vocab(self) -> int:
    """Ids are below this."""
    return self.tokenizer.vocab

  @property
  def manifest(self) -> dict[str, Any]:
    """Documents, positions and bytes of each split, and what was kept out."""
    return self.prepared.manifest

  def examples(self) -> int:
    return self._train.count

  def spec(self, size: int) -> "dict[str, jax.ShapeDtypeStruct]":
    import jax

    shape = size, self._config.seq
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in FIELDS.items()}

  def batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    return self._train(example + np.arange(size)[rows or slice(None)])

  def eval_examples(self) -> int:
    return self._validation.count

  def eval_batch(self, example: int, size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    batch = self._validation(example + np.arange(size)[rows or slice(None)])
    return batch | {"bytes": self._byte_lengths[batch["targets"]] * batch["weights"]}

  @functools.cached_property
  def _train(self) -> Rows:
    seq, there = self._config.seq, self.manifest["splits"]["train"]["positions"]
    if seq > max(there, PADDED):
      raise Refused(
        f"rows of {seq} tokens are longer than all of the training text, which has {there}; set "
        f"data.seq to {max(there, PADDED)} or less"
      )
    return self._rows("train", self._seed)

  @functools.cached_property
  def _validation(self) -> Rows:
    return self._rows("validation", None)

  @functools.cached_property
  def _byte_lengths(self) -> np.ndarray:
    return self.tokenizer.byte_lengths()

  def _rows(self, name: str, seed: int | None) -> Rows:
    c = self._config
    return Rows(*self.prepared.split(name), seq=c.seq, packing=c.packing, seed=seed)
