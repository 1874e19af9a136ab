"""Malformed inputs through every reader: what is wrong is refused or told of, and nothing else."""

import contextlib
import faulthandler
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigtrain.config import Refused
from tests import runs
from tools.faults import mutate
from tools.faults.bench import Bench
from tools.faults.result import Result

LIMIT = 30  # Seconds for one input.
Mutation = Callable[[bytes, random.Random], bytes]
TEXT = "\n\n".join(f"It is a truth universally acknowledged, number {i}." for i in range(12))
RECORDS = "".join(json.dumps({"text": f"{TEXT[:i]} é", "id": i}) + "\n" for i in range(1, 40, 4))


class Reader(NamedTuple):
  """A way in: files that are whole, how one becomes malformed, and what reads them."""

  make: Callable[[Path], list[Path]]  # Writes what is whole to a folder: what may be damaged of it.
  read: Callable[[Path], Any]  # Of the folder.
  mutation: Mutation = mutate.damaged


class Hang(BaseException):
  """No reader catches it."""


def one_file(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path], list[Path]]:
  def make(folder: Path) -> list[Path]:
    (folder / name).write_bytes(data() if callable(data) else data)
    return [folder / name]

  return make


def _text(name: str) -> Callable[[Path], Any]:
  def read(folder: Path) -> Any:
    from bigtrain.data import readers

    return [*readers.read(folder / name, "text", 10**6, lambda n: None)]

  return read


def _prepared(name: str) -> Callable[[Path], Any]:
  def read(folder: Path) -> Any:
    from bigtrain.data.prepare.readers import documents
    from bigtrain.data.prepare.recipe import Prepare

    return [*documents(folder / name, Prepare(inputs=(str(folder),)), lambda n: None)]

  return read


def _zst(text: str) -> bytes:
  import zstandard

  return zstandard.compress(text.encode())


def _parquet() -> bytes:
  import pyarrow
  import pyarrow.parquet

  out = io.BytesIO()
  rows = [json.loads(line) for line in RECORDS.splitlines()]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=3)
  return out.getvalue()


def _warc() -> bytes:
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


def _tokenizer() -> bytes:
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


def make_config(folder: Path) -> list[Path]:
  from bigtrain import load

  load.write(runs.base(), folder)
  return [folder / "config.json"]


def read_config(folder: Path) -> Any:
  from bigtrain import load
  from bigtrain.validate import validate

  experiment, _ = load.read(folder)
  validate(experiment)


def make_records(folder: Path) -> list[Path]:
  """A run's records, as the run left in peace has them."""
  names = ("metrics.jsonl", "events.jsonl", "environment.json", "data.json")
  rows = [{"step": i, "kind": k, "time": 1e9 + i, "loss": 1.0, "step_seconds": 0.1}
          for i in range(1, 9) for k in ("train", "eval", "layers")]  # fmt: skip
  events = [
    {"time": 1e9, "event": "start", "processes": 1, "devices": 1, "mesh": {}, "microbatches": 1},
    {"time": 1e9 + 1, "event": "compile", "shapes": {"tokens": [8, 64]}, "seconds": 0.5},
    {"time": 1e9 + 2, "event": "save", "step": 4, "seconds": 0.1},
    {"time": 1e9 + 3, "event": "verified", "step": 4, "arrays": 3, "seconds": 0.1},
    {"time": 1e9 + 4, "event": "start", "processes": 1, "devices": 1, "mesh": {}},
    {"time": 1e9 + 5, "event": "restore", "seconds": 0.1},
    {"time": 1e9 + 6, "event": "resume", "step": 4, "lost_steps": 2, "lost_seconds": 1.0},
    {"time": 1e9 + 7, "event": "goodput", "goodput": 0.5, "wall": 7.0, "of": {"compute": 3.5}},
    {"time": 1e9 + 8, "event": "hang", "phase": "step", "seconds": 8.0, "missing": [1]},
    {"time": 1e9 + 9, "event": "end"},
  ]
  lines = lambda records: "".join(json.dumps(r) + "\n" for r in records)
  texts = (lines(rows), lines(events), '{"command": ["x"], "devices": [1, "cpu", "cpu"]}', "{}")
  for name, text in zip(names, texts, strict=True):
    (folder / name).write_text(text)
  return [folder / name for name in names]


def read_records(folder: Path) -> Any:
  """As a start of the run reads them, and then the report."""
  from bigtrain import elastic, goodput
  from bigtrain.report.page import page
  from bigtrain.report.records import read
  from bigtrain.run_directory import RunDirectory

  directory = RunDirectory(folder)
  elastic.fitted(runs.base(), directory.events())
  goodput.resume(directory, 4)
  goodput.of(directory)
  directory.close()
  return page([read(folder)], ["run"])


def make_checkpoint(folder: Path) -> list[Path]:
  from bigtrain.checkpoint import Store
  from bigtrain.experiment import Checkpoints
  from bigtrain.run_directory import RunDirectory
  from tests import toys
  from tools.faults.saving import tree

  with Store(RunDirectory(folder).checkpoints, Checkpoints()) as store:
    store.save(3, tree(3), toys.experiment())
    store.keep_next(3, {"loss": 1.0, "gradient_norm": 1.0, "data_digest": 1.0, "where": {}})
  return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def read_checkpoint(folder: Path) -> Any:
  import jax

  from bigtrain.checkpoint import Store
  from bigtrain.run_directory import RunDirectory
  from tools.faults.saving import tree

  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
  with Store(RunDirectory(folder).checkpoints) as store:
    steps = store.steps()
    found = store.restore(3, like) if 3 in steps else None
    store.next_step(3)
  if found is not None and any(
    not np.array_equal(value, tree(3)[name]) for name, value in found.items()
  ):
    raise AssertionError("what was restored is not what was saved")


def make_weights(folder: Path) -> list[Path]:
  from safetensors.numpy import save_file

  rng = np.random.default_rng(0)
  save_file(
    {f"model.layers.{i}.w": rng.normal(size=(4, 3)).astype(np.float32) for i in range(4)},
    folder / "w.safetensors",
  )
  return [folder / "w.safetensors"]


def read_weights(folder: Path) -> Any:
  from bigtrain.interop import huggingface

  return huggingface.read(folder / "w.safetensors")


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
  with cached(folder):
    batch_of(folder)
  of_data = [p for p in sorted((folder / "cache").rglob("*")) if p.is_file() and p.stat().st_size]
  return [p for p in of_data if p.suffix != ".lock"]


@contextlib.contextmanager
def cached(folder: Path) -> Iterator[None]:
  before = os.environ["BIGTRAIN_CACHE"]
  os.environ["BIGTRAIN_CACHE"] = str(folder / "cache")
  try:
    yield
  finally:
    os.environ["BIGTRAIN_CACHE"] = before


def batch_of(folder: Path) -> dict[str, np.ndarray]:
  from bigtrain.data.sources import Files
  from bigtrain.data.text import TextData

  source = Files(pattern=str(folder / "*.*"), validation=0.2)
  return TextData(source=source, seq=32).make(0).batch(5, 4)


def read_cache(folder: Path) -> Any:
  """The damaged cache is made anew, so the batch is what it was."""
  with cached(folder):
    found = batch_of(folder)
  expected = BATCHES.setdefault("cache", found)
  if any(not np.array_equal(found[name], expected[name]) for name in expected):
    raise AssertionError("the batch is not what it was")


BATCHES: dict[str, dict[str, np.ndarray]] = {}


def make_arguments(folder: Path) -> list[Path]:
  words = ["--steps", "30", "--optimizer.lr", "1e-3", "--model.dim", "64", "--quiet",
           "--data.source.pattern", "x", "--logging.no_tensorboard", "--optimizer.schedule.warmup",
           "5", "--faults.policy", "skip", "--checkpoints.keep_every", "None"]  # fmt: skip
  (folder / "arguments").write_text("\n".join(words))
  return [folder / "arguments"]


def read_arguments(folder: Path) -> Any:
  from bigtrain.cli import override

  words = (folder / "arguments").read_bytes().decode(errors="surrogateescape").split("\n")
  with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):  # --help.
    override(runs.base(), words, "bigtrain train")


READERS = {
  "txt": Reader(one_file("a.txt", TEXT.encode()), _text("a.txt")),
  "txt.gz": Reader(one_file("a.txt.gz", gzip.compress(TEXT.encode())), _text("a.txt.gz")),
  "txt.zst": Reader(one_file("a.txt.zst", lambda: _zst(TEXT)), _text("a.txt.zst")),
  "jsonl": Reader(one_file("a.jsonl", RECORDS.encode()), _text("a.jsonl"), mutate.json_text),
  "jsonl.zst": Reader(one_file("a.jsonl.zst", lambda: _zst(RECORDS)), _text("a.jsonl.zst")),
  "parquet": Reader(one_file("a.parquet", _parquet), _text("a.parquet")),
  "html": Reader(
    one_file("a.html", f"<html><body><p>{TEXT}</p></body></html>".encode()), _prepared("a.html")
  ),
  "warc": Reader(one_file("a.warc", _warc), _prepared("a.warc")),
  "warc.gz": Reader(one_file("a.warc.gz", lambda: gzip.compress(_warc())), _prepared("a.warc.gz")),
  "tokenizer": Reader(one_file("tokenizer.json", _tokenizer), read_tokenizer, mutate.json_text),
  "config": Reader(make_config, read_config, mutate.json_text),
  "records": Reader(make_records, read_records, mutate.json_text),
  "checkpoint": Reader(make_checkpoint, read_checkpoint),
  "safetensors": Reader(make_weights, read_weights),
  "jpeg": Reader(one_file("a.jpg", image("JPEG")), read_image("a.jpg")),
  "png": Reader(one_file("a.png", image("PNG")), read_image("a.png")),
  "webp": Reader(one_file("a.webp", image("WEBP")), read_image("a.webp")),
  "bmp": Reader(one_file("a.bmp", image("BMP")), read_image("a.bmp")),
  "arrays": Reader(make_arrays, read_arrays),
  "prepared": Reader(make_shards, read_shards, damage_shards),
  "cache": Reader(make_cache, read_cache, damage_shards),
  "arguments": Reader(make_arguments, read_arguments),
}
DEAR = {"html", "warc", "warc.gz", "records", "checkpoint", "cache", "config"}  # Take longer.


def malformed(bench: Bench, times: int, seed: int) -> Iterator[Result]:
  """So many in all, of which a reader that takes long has fewer; a result for each reader."""
  shares = {name: 1 if name in DEAR else 3 for name in READERS}
  for name, reader in READERS.items():
    count = -(-times * shares[name] // sum(shares.values()))
    began = time.monotonic()
    refused, wrong = through(reader, bench.new(), count, seed)
    yield Result(
      "malformed-input", seed, f"{name}: {count} inputs, {refused} refused"
      + "".join(f"; {told}" for told in wrong[:3]), kept=not wrong,
      recovery=round((time.monotonic() - began) / count, 3),
    )  # fmt: skip


def through(reader: Reader, folder: Path, count: int, seed: int) -> tuple[int, list[str]]:
  """How many inputs were refused, and what else happened, each once."""
  whole, wrong, refused = folder / "whole", {}, 0
  whole.mkdir(parents=True)
  parts = [path.relative_to(whole) for path in reader.make(whole)]
  reader_at = folder / "read"
  for i in range(count):
    rng = random.Random(f"{seed} {i}")
    shutil.rmtree(reader_at, ignore_errors=True)
    shutil.copytree(whole, reader_at)
    if i:  # The first one is whole.
      part = reader_at / rng.choice(parts)
      part.write_bytes(reader.mutation(part.read_bytes(), rng))
    try:
      with limited(LIMIT):
        reader.read(reader_at)
    except Refused as error:
      refused += 1
      if not i:
        wrong["whole"] = f"what is whole was refused: {error}"
    except BaseException as error:  # A panic of a library's Rust is no Exception.
      if isinstance(error, KeyboardInterrupt):
        raise
      last = traceback.extract_tb(error.__traceback__)[-1]
      place = f"{Path(last.filename).name}:{last.lineno}"
      wrong.setdefault((type(error), place), f"input {i}: {error!r:.200} at {place}")
  return refused, [*wrong.values()]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
  """What does not let Python interrupt it ends the process, with its stack."""

  def stop(*_):
    raise Hang(f"after {seconds} s")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(seconds)
  faulthandler.dump_traceback_later(4 * seconds, exit=True)
  try:
    yield
  finally:
    signal.alarm(0)
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGALRM, before)
