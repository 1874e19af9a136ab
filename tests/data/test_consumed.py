"""What is consumed does not depend on how many processes read it, nor on when that changes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data.augment import HorizontalFlip, PadCrop, RandomErasing
from bigtrain.data.datasets import Digits
from bigtrain.data.masked import SPECIAL, MaskedText
from bigtrain.data.mixture import Mixture, Source
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE
from bigtrain.data.vision import ImageData
from bigtrain.experiment import DataConfig

SIZE = 24  # Rows of a batch.


def text(folder: Path, name: str, documents: int) -> Files:
  rng = random.Random(name)
  lines = []
  for _ in range(documents):
    words = ["".join(rng.choices("abcdefg", k=4)) for _ in range(rng.randrange(2, 60))]
    lines.append(json.dumps({"text": " ".join(words)}))
  path = folder / f"{name}.jsonl"
  path.write_text("\n".join(lines))
  return Files(pattern=str(path), validation=0.1)


def of_text(folder: Path) -> DataConfig:
  return TextData(source=text(folder, "alone", 80), seq=32)


def mixed(folder: Path) -> DataConfig:
  sources = {"many": text(folder, "many", 60), "few": text(folder, "few", 20)}
  parts = [Source(name=n, data=TextData(source=s, seq=32), weight=1.0) for n, s in sources.items()]
  return Mixture(sources=tuple(parts))


def masked(folder: Path) -> DataConfig:
  tokenizer = BPE(vocab=300, special=SPECIAL)
  return MaskedText(source=text(folder, "masked", 80), tokenizer=tokenizer, seq=32)


def augmented(folder: Path) -> DataConfig:
  changes = (HorizontalFlip(), PadCrop(pixels=2), RandomErasing())
  return ImageData(source=Digits(), size=8, channels=1, augment=changes)


def consumed(c: DataConfig, processes: list[int]) -> list[dict[str, bytes]]:
  """The bytes of each step; whenever the number changes all processes begin anew."""
  found, each = [], []
  for step, count in enumerate(processes):
    if count != len(each):
      each = [c.make(seed=5) for _ in range(count)]
    rows = SIZE // count
    cuts = [slice(p * rows, (p + 1) * rows) for p in range(count)]
    parts = [data.batch(step * SIZE, SIZE, cut) for data, cut in zip(each, cuts, strict=True)]
    names = parts[0].keys()
    found.append({n: np.concatenate([part[n] for part in parts]).tobytes() for n in names})
  return found


@pytest.mark.parametrize("make", [of_text, mixed, masked, augmented])
def test_processes_that_become_fewer_consume_the_same_bytes(make, tmp_path, monkeypatch):
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  c = make(tmp_path)
  alone = consumed(c, [1] * 9)
  assert consumed(c, [8, 8, 8, 3, 3, 3, 1, 1, 1]) == alone
  assert consumed(c, [3, 8, 1, 8, 3, 1, 24, 2, 12]) == alone
  assert len({tuple(step.values()) for step in alone}) == 9
