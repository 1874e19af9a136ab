"""Recipe: everything that decides what a preparation makes of its input."""

import pathlib
from typing import Literal

from bigtrain.config import Refused, config, configs
from bigtrain.data.prepare.engine import Local, Ray, Slurm
from bigtrain.data.prepare.readers import KINDS, kind_of
from bigtrain.data.prepare.steps import ControlCharacters, Repair, Step, Whitespace
from bigtrain.data.sources import expand
from bigtrain.data.tokenizers import BPE

FORMAT = 1  # Of the prepared folder.


@config
class NearDuplicates:
  """Near duplicates by MinHash over bands of hashes (Broder 1997; Leskovec et al., chapter 3).

  Two documents whose sets of `words`-grams have the Jaccard similarity s meet with probability
  1 - (1 - s**rows)**bands: 0.92 at 0.8 and 0.56 at 0.7 with the defaults, those of FineWeb. Those
  that meet are compared exactly: below `threshold` they are no duplicates.
  """

  words: int = 5  # Of a shingle; letters in scripts without spaces.
  bands: int = 14
  rows: int = 8  # Hashes of a band.
  threshold: float = 0.7  # Jaccard similarity.
  seed: int = 1  # Of the hashes.

  def recall(self, similarity: float) -> float:
    """The probability that a pair of that similarity meets."""
    return 1 - (1 - similarity**self.rows) ** self.bands

  def check(self) -> None:
    for name in ("words", "bands", "rows"):
      if getattr(self, name) < 1:
        raise Refused(f"near.{name} is {getattr(self, name)}: at least 1")
    if not 0 < self.threshold <= 1:
      raise Refused(f"near.threshold is {self.threshold}: above 0 and at most 1")


@config
class SharedLines:
  """Lines that stand in many documents, such as menus and notices, are taken out of all of them.

  They are counted after duplicates are gone, so that copies of a document do not count.
  """

  documents: int = 20  # In so many documents a line is a shared one.
  min_chars: int = 20  # Shorter lines stay.

  def check(self) -> None:
    for name, least in (("documents", 2), ("min_chars", 1)):
      if getattr(self, name) < least:
        raise Refused(f"lines.{name} is {getattr(self, name)}: at least {least}")


@config
class Prepare:
  """Text files in; cleaned, deduplicated, split shards out."""

  inputs: tuple[str, ...]  # Folders, globs or files; see `readers` for what can be read.
  text_field: str = "text"  # Of .jsonl and .parquet.
  split_at: str = ""  # Regular expression of a line that begins a new document, in .txt and .md.
  max_bytes: int = 2**27  # Of one document; a longer one is rejected.
  steps: tuple[Step, ...] = (Repair(), ControlCharacters(), Whitespace())
  exact: Literal["remove", "keep"] = "remove"  # Documents equal to an earlier one.
  near: NearDuplicates | None = NearDuplicates()
  lines: SharedLines | None = None
  validation: float = 0.01  # Share of the documents, by hash.
  test: float = 0.01
  tokenizer: BPE | None = None  # Learned from the training split, into tokenizer.json.
  shard_bytes: int = 2**28  # Of text in a shard, about.
  previous: str | None = None  # An earlier prepared folder, to compare the split with.
  # The work is cut into so many pieces, by file: what one of them holds in memory shrinks with it.
  tasks: int = 8
  engine: Local | Slurm | Ray = Local()

  def check(self) -> None:
    """Refuses impossible values of this config and of all in it.

    Raises:
      Refused: with the field and the remedy.
    """
    import re

    if not self.inputs:
      raise Refused("inputs is empty: name folders, globs or files")
    for name in ("tasks", "max_bytes", "shard_bytes"):
      if getattr(self, name) < 1:
        raise Refused(f"{name} is {getattr(self, name)}: at least 1")
    shares = self.validation, self.test
    if min(shares) < 0 or sum(shares) >= 1:
      raise Refused(
        f"validation={shares[0]} and test={shares[1]}: at least 0 each, below 1 together"
      )
    try:
      re.compile(self.split_at)
    except re.error as error:
      raise Refused(f"split_at is {self.split_at!r}, no regular expression: {error}") from None
    if self.exact == "keep" and self.near is not None:
      raise Refused("exact='keep' with near duplicates removed makes no sense: set near=None, too")
    if self.previous is not None and not (pathlib.Path(self.previous) / "manifest.json").exists():
      raise Refused(
        f"previous={self.previous!r} is no finished preparation: no manifest.json there"
      )
    for _, node in configs(self):
      if node is not self and hasattr(node, "check"):
        node.check()

  def files(self) -> list[pathlib.Path]:
    """The input files, each once, in order of their paths."""
    return sorted({path for pattern in self.inputs for path in expand(pattern, kind_of, KINDS)})
