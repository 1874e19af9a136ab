"""Time to reach a batch: on the embedded corpus, and on a made-up one of 10^9 documents.

`python tools/benchmarks/data_access.py [--documents N]` prints a table. The large corpus needs no
disk: its prefix sums (8 MB) are made first, which is preparation and not timed; the lengths of a
window's documents come from a hash, its tokens from a hole in a file. Everything else is what a run
does. "start" is opening the prepared data; "first" the first batch, with nothing planned; "jump" a
batch at a random example of a random epoch; "next" one batch after another, as in training; "MB"
how far the peak memory of the process rose.
"""

import argparse
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from bigtrain.data.cache import Split, Stored
from bigtrain.data.pack import Packing
from bigtrain.data.rows import WINDOW, Rows
from bigtrain.data.shuffle import hashes, key_of
from bigtrain.data.text import TextData

SEQ, BATCH = 2048, 32
MEAN = 700  # Tokens of a made-up document, about; exponentially distributed.
JUMPS, STEPS = 100, 2000
KEY = key_of(1)
COLUMNS = ("documents", "packing", "rows", "start", "first", "jump", "p95", "next", "MB")


def lengths(first: int, last: int) -> np.ndarray:
  """Positions of the made-up documents [first, last)."""
  uniform = (hashes(KEY, np.arange(first, last)) >> np.uint64(11)) / 2.0**53
  return 2 + (-MEAN * np.log1p(-uniform)).astype(np.int64)


class MadeUpOffsets(Stored):
  """The offsets file of the made-up corpus, computed where it is sliced."""

  def __init__(self, windows: np.ndarray):
    self._windows = windows

  def __getitem__(self, at: slice) -> np.ndarray:
    begin = self._windows[at.start // WINDOW]
    return begin + np.concatenate([[0], np.cumsum(lengths(at.start, at.stop - 1))])


def prefix_sums(documents: int) -> np.ndarray:
  """What preparation writes to disk: the positions before every window, and in all."""
  sums = [0]
  for first in range(0, documents, 64 * WINDOW):
    drawn = lengths(first, min(first + 64 * WINDOW, documents))
    sums += np.add.reduceat(drawn, np.arange(0, len(drawn), WINDOW)).tolist()
  return np.cumsum(sums)


def memory() -> float:
  """The most memory this process has held so far, MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(table: Table, start: Callable[[], Split]) -> None:
  """Adds a row for each packing; `start` opens the data."""
  for packing in get_args(Packing):
    before, begun = memory(), time.perf_counter()
    split = start()
    rows = Rows(*split, seq=SEQ, packing=packing, seed=0)
    opened = (time.perf_counter() - begun) * 1e3
    first = timed(rows, 0)
    jumps = np.random.default_rng(0).integers(0, 10 * rows.count, JUMPS)
    jump = [timed(rows, at) for at in jumps]
    following = [timed(rows, step * BATCH) for step in range(STEPS)]
    size = f"{split.documents:,}", packing, f"{rows.count:,}"
    times = f"{opened:.1f}", f"{first:.1f}", f"{np.median(jump):.1f}"
    times += f"{np.percentile(jump, 95):.1f}", f"{np.mean(following):.2f}"
    table.add_row(*size, *times, f"{memory() - before:.0f}")


def timed(rows: Rows, example: int) -> float:
  """Milliseconds that one batch takes."""
  begun = time.perf_counter()
  rows(example + np.arange(BATCH))
  return (time.perf_counter() - begun) * 1e3


def main() -> None:
  parser = argparse.ArgumentParser(description="Time to reach a batch.")
  parser.add_argument("--documents", type=int, default=10**9, help="of the made-up corpus")
  documents = parser.parse_args().documents
  console = Console()
  console.width = max(console.width, 100)
  table = Table(title=f"batches of {BATCH} rows of {SEQ} tokens; times in milliseconds")
  for column in COLUMNS:
    table.add_column(column, justify="right", no_wrap=True)
  TextData().make(0).batch(0, 1)  # Prepares the corpus where it was not.
  measure(table, lambda: TextData().make(0).prepared.split("train"))
  with console.status("making prefix sums"):
    windows = prefix_sums(documents)
  with tempfile.NamedTemporaryFile() as file:
    file.truncate(2 * (int(windows[-1]) + 1))
    tokens = Stored(pathlib.Path(file.name), "<u2")
    split = Split(tokens, MadeUpOffsets(windows), windows, documents)
    measure(table, lambda: split)
  console.print(table)


if __name__ == "__main__":
  main()
