"""Tokenizers: text to ids and back, with one end-of-text id and the bytes each id stands for.

Documents are ordinary text to all of them: a document that spells a special token gets the tokens
of those letters, never the special id. Each config is small; `make` gives the tokenizer.
"""

import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from etils import epath

from bigtrain import files
from bigtrain.config import Refused, config, nearest

if TYPE_CHECKING:
  import tokenizers

EOT = "<|endoftext|>"
SPACES = ("Ġ", "Ċ", "ĉ", "▁")  # As byte-level tokens write space, newline and tab; SentencePiece.
Texts = Callable[[], Iterable[str]]  # Opens the training texts for one more reading.


class Tokenizer(Protocol):
  """What the data room and sampling ask of a tokenizer."""

  vocab: int  # Ids are below this.
  eot: int  # Before, between and after documents; encoding never gives it.
  digest: str  # Of everything that decides what it gives.
  json: str | None  # As a tokenizer.json; None where its config is enough to make it again.

  def encode(self, text: str) -> np.ndarray:
    """(n,) int32 ids of one text, without special tokens."""
    ...

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    """The ids of many texts, in parallel where the tokenizer can."""
    ...

  def decode(self, ids) -> str:
    """The text of these ids; special tokens are left out."""
    ...

  def byte_lengths(self) -> np.ndarray:
    """(vocab,) float32: the UTF-8 bytes of text each id stands for; 0 for special tokens."""
    ...

  def id_of(self, token: str) -> int:
    """The id of a special token; refused if there is none."""
    ...

  def word_starts(self) -> np.ndarray:
    """(vocab,) bool: whether a token begins a word; its others continue the one before."""
    ...


@config
class Bytes:
  """UTF-8 bytes as ids 0 to 255, and end-of-text as 256. Nothing to learn, nothing unknown."""

  def size(self) -> int:
    return 257

  def make(self, corpus: str, texts: Texts, folder: pathlib.Path) -> "ByteTokenizer":
    return ByteTokenizer()

  def read(self, path: epath.Path) -> "ByteTokenizer":
    return ByteTokenizer()


@config
class BPE:
  """Byte-level byte-pair encoding (Sennrich et al. 2016, Radford et al. 2019), learned from the
  training split and kept in the cache."""

  vocab: int = 4096  # Ids, 256 bytes, end-of-text and the special tokens among them.
  special: tuple[str, ...] = ()  # Tokens that no text gives, such as "[MASK]".

  def size(self) -> int:
    return self.vocab

  def check(self) -> None:
    if self.vocab < (least := 257 + len(self.special)):
      raise Refused(
        f"vocab is {self.vocab}: at least {least}, for every byte, end-of-text and special tokens"
      )
    if len({EOT, *self.special}) <= len(self.special):
      raise Refused(f"special tokens are named twice, or {EOT}, which is there already")

  def make(self, corpus: str, texts: Texts, folder: pathlib.Path) -> "FileTokenizer":
    """Learns it, or takes it from `folder`. The caller holds the cache's lock.

    Args:
      corpus: the digest of the training texts.
      texts: opens the training texts.
      folder: where learned tokenizers are kept.
    """
    more = f" {self.special}" if self.special else ""
    name = hashlib.sha256(f"bpe 1 {self.vocab} {corpus}{more}".encode()).hexdigest()[:32]
    path = folder / f"{name}.json"
    if not path.exists():
      folder.mkdir(parents=True, exist_ok=True)
      files.replace(path, self._learn(texts()).to_str())
    return FileTokenizer(path, EOT, self.vocab)

  def read(self, path: epath.Path) -> "FileTokenizer | None":
    """What was learned before and kept in a file, if that is there."""
    return FileTokenizer(path, EOT, self.vocab) if path.exists() else None

  def _learn(self, texts: Iterable[str]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
      vocab_size=self.vocab,
      special_tokens=[EOT, *self.special],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


@config
class TokenizerFile:
  """Any Hugging Face tokenizer.json."""

  path: str  # Of the tokenizer.json.
  eot: str = EOT  # The token that ends a document, as that file spells it.

  def size(self) -> int:
    return self._open().vocab

  def make(self, corpus: str, texts: Texts, folder: pathlib.Path) -> "FileTokenizer":
    return self._open()

  def read(self, path: epath.Path) -> "FileTokenizer | None":
    """A copy of the file, if it is there."""
    return FileTokenizer(path, self.eot) if path.exists() else None

  def _open(self) -> "FileTokenizer":
    path = pathlib.Path(self.path).expanduser()
    if not path.is_file():
      near = nearest(path.name, [p.name for p in path.parent.glob("*")])
      raise Refused(f"tokenizer {self.path} is not a file{near}; give a tokenizer.json")
    return FileTokenizer(path, self.eot)


class ByteTokenizer:
  """UTF-8 bytes."""

  vocab, eot, digest = 257, 256, "bytes 1"
  json: str | None = None

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, ids) -> str:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

  def byte_lengths(self) -> np.ndarray:
    return np.append(np.ones(256, np.float32), np.float32(0))

  def id_of(self, token: str) -> int:
    raise Refused(f"a tokenizer of bytes has no {token!r}; take BPE or TokenizerFile")

  def word_starts(self) -> np.ndarray:
    return np.isin(np.arange(257), list(b" \n\t"))


class FileTokenizer:
  """A tokenizer.json of the Hugging Face tokenizers library.

  Args:
    path: the file.
    eot: the end-of-text token.
    vocab: ids to count; by default as many as the file needs. Ids beyond the file's stay unused.

  Raises:
    Refused: the file is not a tokenizer, or has no token `eot`.
  """

  def __init__(self, path: pathlib.Path | epath.Path, eot: str, vocab: int | None = None):
    from tokenizers import Tokenizer

    data = path.read_bytes()
    try:
      self._tokenizer = Tokenizer.from_buffer(data)
    except BaseException as error:
      # A panic of Rust is no Exception, and its class cannot be imported.
      if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise
      raise Refused(f"{path} is not a tokenizer.json: {error}") from None
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    if (found := self._tokenizer.token_to_id(eot)) is None:
      added = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
      raise Refused(
        f"{path} has no token {eot!r}{nearest(eot, added)}; set tokenizer.eot to the token that "
        f"ends a document: one of {', '.join(sorted(added)[:8]) or 'its vocabulary'}"
      )
    self.eot = found
    self.json: str | None = data.decode()
    self.vocab = vocab or max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.digest = hashlib.sha256(data + f"{eot} {self.vocab}".encode()).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def decode(self, ids) -> str:
    return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

  def id_of(self, token: str) -> int:
    added = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items()}
    if token not in added:
      raise Refused(f"the tokenizer has no special token {token!r}{nearest(token, added)}")
    return added[token]

  def word_starts(self) -> np.ndarray:
    """By the marks of WordPiece (a "##" continues) and of others (a space begins, written ▁ or Ġ).

    Byte-level tokens that begin with another white space begin a word too; punctuation that follows
    a word directly belongs to it, but not in WordPiece, whose text is split there before.
    """
    tokens = self._tokenizer.get_vocab(with_added_tokens=True)
    word_piece = any(token.startswith("##") for token in tokens)
    starts = np.zeros(self.vocab, bool)
    for token, i in tokens.items():
      starts[i] = not token.startswith("##") if word_piece else token[:1] in SPACES
    return starts

  def byte_lengths(self) -> np.ndarray:
    """Exact for byte-level tokenizers without a normalizer: a document's sum is its UTF-8 length.

    Of others the vocabulary is read as SentencePiece and WordPiece write it: "▁" is a space,
    "<0x0A>" one byte, a leading "##" nothing. What their normalizers add or drop is not seen.
    """
    from tokenizers import pre_tokenizers

    tokens = self._tokenizer.get_vocab(with_added_tokens=True)
    added = self._tokenizer.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    byte_level = "ByteLevel" in str(self._tokenizer.decoder)
    lengths = np.zeros(self.vocab, np.float32)
    for token, i in tokens.items():
      if i in added:
        lengths[i] = 0 if added[i].special else len(token.encode())
      elif byte_level and alphabet.issuperset(token):
        lengths[i] = len(token)  # Its alphabet writes every byte as one character.
      elif re.fullmatch("<0x[0-9A-F]{2}>", token):
        lengths[i] = 1
      else:
        lengths[i] = len(token.removeprefix("##").replace("▁", " ").encode())
    lengths[self.eot] = 0
    return lengths
