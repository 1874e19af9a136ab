"""Whole data of every kind that can be read, and what reads it."""

import contextlib
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import Refused
from tools.faults import mutate
from tools.faults.bench import cache_at

TEXT = "\n\n".join(f"It is a truth universally acknowledged, number {i}." for i in range(12))
RECORDS = "".join(json.dumps({"text": f"{TEXT[:i]} é", "id": i}) + "\n" for i in range(1, 40, 4))


def one_file(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path], list[Path]]:
  def make(folder: Path) -> list[Path]:
    (folder / name).write_bytes(data() if callable(data) else data)
    return [folder / name]

  return make


def read_text(name: str) -> Callable[[Path], Any]:
  def read(folder: Path) -> Any:
    from bigtrain.data import readers

    return [*readers.read(folder / name, "text", 10**6, lambda n: None)]

  return read


def read_prepared(name: str) -> Callable[[Path], Any]:
  def read(folder: Path) -> Any:
    from bigtrain.data.prepare.readers import documents
    from bigtrain.data.prepare.recipe import Prepare

    return [*documents(folder / name, Prepare(inputs=(str(folder),)), lambda n: None)]

  return read


def zst(text: str) -> bytes:
  import zstandard

  return zstandard.compress(text.encode())


def parquet() -> bytes:
  import pyarrow
  import pyarrow.parquet

  out = io.BytesIO()
  rows = [json.loads(line) for line in RECORDS.splitlines()]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=3)
  return out.getvalue()


def warc() -> bytes:
  from warcio.statusandheaders import StatusAndHeaders
  from warcio.warcwriter import WARCWriter

  out = io.BytesIO()
  writer = WARCWriter(out, gzip=False)
  for i in range(3):
    page = f"<html><body><p>{TEXT}</p><p>Page {i}</p></body></html>".encode()
    head = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
    writer.write_record(
      writer.create_warc_record(
        f"http://x/{i}", "response", payload=io.BytesIO(page), http_headers=head
      )
    )
  return out.getvalue()


def tokenizer() -> bytes:
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator([TEXT], trainer)
  return made.to_str().encode()


def read_tokenizer(folder: Path) -> Any:
  from bigtrain.data.tokenizers import TokenizerFile

  made = TokenizerFile(path=str(folder / "tokenizer.json")).make("x", lambda: [TEXT], folder)
  return made.byte_lengths(), made.word_starts(), made.decode(made.encode(TEXT[:200]))


def image(kind: str) -> Callable[[], bytes]:
  def make() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()

  return make


def read_image(name: str) -> Callable[[Path], Any]:
  def read(folder: Path) -> Any:
    from bigtrain.data.folders import ImageFolder
    from bigtrain.data.vision import ImageData

    source = ImageFolder(train=str(folder), classes=1)
    data = ImageData(source=source, size=16).make(0)
    raw = (folder / name).read_bytes()
    return data.problem(raw) or data.inputs([raw], None)

  return read


def make_arrays(folder: Path) -> list[Path]:
  """One of them with a program within, which numpy would run if it were let."""
  rng = np.random.default_rng(0)
  inputs, labels = rng.normal(size=(9, 4)).astype(np.float32), np.arange(9) % 3
  np.savez(folder / "whole.npz", inputs=inputs, labels=labels)
  np.save(folder / "inputs.npy", inputs)
  np.save(folder / "labels.npy", labels)
  np.savez(folder / "program.npz", inputs=np.array([Program(folder / "ran")]), labels=labels[:1])
  (folder / "program.npy").write_bytes(pickle.dumps(Program(folder / "ran")))
  return [*sorted(folder.glob("*.np*"))]


class Program:
  """What it does when it is unpickled: it makes a file."""

  def __init__(self, path: Path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def read_arrays(folder: Path) -> Any:
  from bigtrain.data.arrays import Arrays

  for name in ("whole.npz", ".", "program.npz"):
    with contextlib.suppress(Refused):
      Arrays(train=str(folder / name), size=(4,), classes=3).open()
  if (folder / "ran").exists():
    raise AssertionError("a program in the data was run")


def make_shards(folder: Path) -> list[Path]:
  from bigtrain.data.prepare.pack import Shards

  (folder / "shards").mkdir()
  made = []
  for split in ("train", "validation"):
    shards = Shards(folder / "shards", split, 0, 10**6)
    for i in range(5):
      shards.add({"id": str(i), "digest": "0", "text": f"{split} {i} {TEXT}"})
    shards.close()
    made += shards.done
  (folder / "manifest.json").write_text(json.dumps({"shards": made}))
  return [folder / "manifest.json", *sorted((folder / "shards").iterdir())]


def read_shards(folder: Path) -> Any:
  from bigtrain.data.sources import PreparedText

  source = PreparedText(path=str(folder))
  source.check()
  return [*source.documents(lambda n: None)]


def damage_shards(data: bytes, rng: random.Random) -> bytes:
  return mutate.json_text(data, rng) if data.startswith(b"{") else mutate.damaged(data, rng)


def make_cache(folder: Path) -> list[Path]:
  (folder / "text.txt").write_text(TEXT)
  (folder / "more.jsonl").write_text(RECORDS)
  with cache_at(folder / "cache"):
    batch_of(folder)
  of_data = [p for p in sorted((folder / "cache").rglob("*")) if p.is_file() and p.stat().st_size]
  return [p for p in of_data if p.suffix != ".lock"]


def batch_of(folder: Path) -> dict[str, np.ndarray]:
  from bigtrain.data.sources import Files
  from bigtrain.data.text import TextData

  source = Files(pattern=str(folder / "*.*"), validation=0.2)
  return TextData(source=source, seq=32).make(0).batch(5, 4)


BATCHES: dict[str, dict[str, np.ndarray]] = {}


def read_cache(folder: Path) -> Any:
  """The damaged cache is made anew, so the batch is what it was."""
  with cache_at(folder / "cache"):
    found = batch_of(folder)
  expected = BATCHES.setdefault("cache", found)
  if any(not np.array_equal(found[name], expected[name]) for name in expected):
    raise AssertionError("the batch is not what it was")
