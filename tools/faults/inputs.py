"""Malformed inputs through every reader: what is wrong is refused or told of, and nothing else."""

import contextlib
import faulthandler
import gzip
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.config import Refused
from tools.faults import mutate, of_data, of_runs
from tools.faults.bench import Bench
from tools.faults.of_data import (
  RECORDS,
  TEXT,
  image,
  one_file,
  parquet,
  read_image,
  read_prepared,
  read_text,
  read_tokenizer,
  tokenizer,
  warc,
  zst,
)
from tools.faults.result import Result

LIMIT = 30  # Seconds for one input.
Mutation = Callable[[bytes, random.Random], bytes]


class Reader(NamedTuple):
  """A way in: files that are whole, how one becomes malformed, and what reads them."""

  make: Callable[[Path], list[Path]]  # Writes what is whole to a folder: what may be damaged of it.
  read: Callable[[Path], Any]  # Of the folder.
  mutation: Mutation = mutate.damaged


class Hang(BaseException):
  """No reader catches it."""


READERS = {
  "txt": Reader(one_file("a.txt", TEXT.encode()), read_text("a.txt")),
  "txt.gz": Reader(one_file("a.txt.gz", gzip.compress(TEXT.encode())), read_text("a.txt.gz")),
  "txt.zst": Reader(one_file("a.txt.zst", lambda: zst(TEXT)), read_text("a.txt.zst")),
  "jsonl": Reader(one_file("a.jsonl", RECORDS.encode()), read_text("a.jsonl"), mutate.json_text),
  "jsonl.zst": Reader(one_file("a.jsonl.zst", lambda: zst(RECORDS)), read_text("a.jsonl.zst")),
  "parquet": Reader(one_file("a.parquet", parquet), read_text("a.parquet")),
  "html": Reader(
    one_file("a.html", f"<html><body><p>{TEXT}</p></body></html>".encode()), read_prepared("a.html")
  ),
  "warc": Reader(one_file("a.warc", warc), read_prepared("a.warc")),
  "warc.gz": Reader(
    one_file("a.warc.gz", lambda: gzip.compress(warc())), read_prepared("a.warc.gz")
  ),
  "tokenizer": Reader(one_file("tokenizer.json", tokenizer), read_tokenizer, mutate.json_text),
  "config": Reader(of_runs.make_config, of_runs.read_config, mutate.json_text),
  "records": Reader(of_runs.make_records, of_runs.read_records, mutate.json_text),
  "checkpoint": Reader(of_runs.make_checkpoint, of_runs.read_checkpoint),
  "safetensors": Reader(of_runs.make_weights, of_runs.read_weights),
  "jpeg": Reader(one_file("a.jpg", image("JPEG")), read_image("a.jpg")),
  "png": Reader(one_file("a.png", image("PNG")), read_image("a.png")),
  "webp": Reader(one_file("a.webp", image("WEBP")), read_image("a.webp")),
  "bmp": Reader(one_file("a.bmp", image("BMP")), read_image("a.bmp")),
  "arrays": Reader(of_data.make_arrays, of_data.read_arrays),
  "prepared": Reader(of_data.make_shards, of_data.read_shards, of_data.damage_shards),
  "cache": Reader(of_data.make_cache, of_data.read_cache, of_data.damage_shards),
  "arguments": Reader(of_runs.make_arguments, of_runs.read_arguments),
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
