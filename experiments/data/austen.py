"""The novels of Jane Austen and this repository's documents, prepared for training.

bigtrain data prepare experiments/data/austen.py --out prepared/austen
"""

from pathlib import Path

from bigtrain.data.prepare.quality import Gopher, GopherRepetition
from bigtrain.data.prepare.recipe import NearDuplicates, Prepare
from bigtrain.data.prepare.steps import (
  ControlCharacters,
  Repair,
  RepeatedLines,
  Scrub,
  Whitespace,
)
from bigtrain.data.tokenizers import BPE

ROOT = Path(__file__).parent.parent.parent


def base() -> Prepare:
  """One document a chapter."""
  return Prepare(
    inputs=(f"{ROOT}/bigtrain/data/corpus/*.txt.zst", f"{ROOT}/docs/*.md", f"{ROOT}/README.md"),
    split_at=r"^(?:(?:VOLUME|Volume) [IVX]+\s+)?(?:CHAPTER|Chapter) (?:[IVXL]+|\d+)\.?[ \t]*$",
    steps=(
      Repair(),
      ControlCharacters(),
      Whitespace(),
      RepeatedLines(),
      Gopher(),
      GopherRepetition(),
      Scrub(),
    ),
    near=NearDuplicates(threshold=0.7),
    validation=0.05,
    test=0.02,
    tokenizer=BPE(vocab=4096),
    tasks=4,
  )
