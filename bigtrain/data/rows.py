"""Rows: every row of a tokenised split by its number, the same bytes whoever asks.

The number of an example decides epoch, window of documents, and row of the window's plan by
arithmetic on prefix sums; only the windows that are asked for are ever planned. Nothing is kept but
a cache of plans, so start-up and memory do not grow with the documents (8 bytes a window).
"""

import collections
import threading

import numpy as np

from bigtrain.data.pack import Packing, Plan, plan
from bigtrain.data.shuffle import hashes, in_blocks, key_of, permute

WINDOW = 1024  # Documents between two entries of the prefix sums on disk.
ROWS_PER_WINDOW = 64  # At least, by joining windows of short documents: padding stays below 1%.
CHUNK = 256  # Neighbouring rows that are shuffled as one, so that a planned window is used again.
GROUP = 256 * CHUNK  # Rows shuffled one by one, drawn from chunks all over the split.
ORDER_BLOCK = 1024  # Examples whose order is computed at once.
ORDER_BLOCKS = 64  # Kept.
PLAN_BYTES = 256 * 2**20  # Memory for plans.
FIELDS = {
  "tokens": np.int32,
  "targets": np.int32,
  "weights": np.float32,
  "segments": np.int32,
  "positions": np.int32,
}


class Rows:
  """The rows of one split.

  Args:
    tokens: (positions + 1,) every document's tokens, with an end-of-text token before the first
      and after each. Position p has tokens[p] as its input and tokens[p + 1] as its target. Sliced.
    offsets: (documents + 1,) the position at which each document starts. Sliced.
    windows: offsets at every WINDOW-th document, and the end.
    documents: how many.
    seq: positions of a row, T.
    packing: how documents fill rows.
    seed: of the order; None for the fixed order of evaluation, in which each row comes once.
  """

  def __init__(
    self, tokens, offsets, windows, documents: int, *, seq: int, packing: Packing, seed: int | None
  ):
    self._tokens, self._offsets = tokens, offsets
    self._seq, self._seed = seq, seed
    self._packing: Packing = packing
    positions = int(windows[-1])
    joined = max(1, -(-ROWS_PER_WINDOW * seq * (len(windows) - 1) // max(positions, 1)))
    self._documents_per_window = joined * WINDOW
    self._documents = documents
    ends = np.append(windows[:-1:joined], windows[-1])
    self._first_row = np.concatenate([[0], np.cumsum(-(-np.diff(ends) // seq))])
    self.count = int(self._first_row[-1])  # Rows of an epoch.
    self._plans: collections.OrderedDict[tuple[int, int], Plan] = collections.OrderedDict()
    self._plan_bytes = 0
    self._lock = threading.Lock()
    self._order = in_blocks(self._order_block, ORDER_BLOCK, ORDER_BLOCKS)
    self._positions = np.arange(seq, dtype=np.int32)

  def __call__(self, examples: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of these examples, (len(examples), T) each; in fixed order past the end, padding."""
    shape = len(examples), self._seq
    batch = {name: np.zeros(shape, kind) for name, kind in FIELDS.items()}
    epochs, rows = self._order(np.asarray(examples, np.int64))
    windows = np.searchsorted(self._first_row, rows, side="right") - 1
    nths = rows - self._first_row[windows]
    for i in np.flatnonzero(rows < self.count):
      found = self._plan(int(epochs[i]), int(windows[i]))
      pieces = slice(found.bounds[nths[i]], found.bounds[nths[i] + 1])
      starts, lengths = found.starts[pieces].tolist(), found.lengths[pieces].tolist()
      self._copy({name: values[i] for name, values in batch.items()}, starts, lengths)
    return batch

  def _order_block(self, block: int) -> np.ndarray:
    """Epoch and row, (2, ORDER_BLOCK), of a block of examples: all rows permuted in every epoch.

    Chunks of neighbouring rows are permuted; then single rows within groups of many chunks; the
    whole is turned by a random offset, so that the chunk that is not full lies elsewhere each time.
    """
    examples = block * ORDER_BLOCK + np.arange(ORDER_BLOCK)
    if self._seed is None:
      return np.stack([np.zeros_like(examples), examples])
    epoch, slot = np.divmod(examples, self.count)
    key = hashes(key_of(self._seed), epoch)
    group, within = np.divmod(slot, GROUP)
    size = np.minimum(GROUP, self.count - group * GROUP)
    slot = group * GROUP + permute(within, size, hashes(key, group + 2))
    chunk, within = np.divmod(slot, CHUNK)
    full = chunk < self.count // CHUNK
    chunk[full] = permute(chunk[full], self.count // CHUNK, hashes(key, 0)[full])
    turn = (hashes(key, 1) % np.uint64(self.count)).astype(np.int64)
    return np.stack([epoch, (chunk * CHUNK + within + turn) % self.count])

  def _plan(self, epoch: int, window: int) -> Plan:
    with self._lock:
      if found := self._plans.get((epoch, window)):
        self._plans.move_to_end((epoch, window))
        return found
    low = window * self._documents_per_window
    high = min(low + self._documents_per_window, self._documents)
    key = None if self._seed is None else key_of(self._seed, epoch, window)
    made = plan(np.asarray(self._offsets[low : high + 1]), self._seq, self._packing, key)
    with self._lock:
      if (epoch, window) not in self._plans:
        self._plans[epoch, window] = made
        self._plan_bytes += made.nbytes
      while self._plan_bytes > PLAN_BYTES and len(self._plans) > 1:
        self._plan_bytes -= self._plans.popitem(last=False)[1].nbytes
    return made

  def _copy(self, row: dict[str, np.ndarray], starts: list[int], lengths: list[int]) -> None:
    """Copies pieces side by side into one row, each (T,)."""
    column = 0
    for segment, (start, length) in enumerate(zip(starts, lengths, strict=True), 1):
      here = slice(column, column + length)
      run = self._tokens[start : start + length + 1]
      row["tokens"][here], row["targets"][here] = run[:-1], run[1:]
      row["segments"][here] = segment
      row["positions"][here] = self._positions[:length]
      column += length
    row["weights"][:column] = 1
