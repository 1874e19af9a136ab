"""Which pieces of which documents stand in a row: the plan of one window of documents.

A document of n tokens has n + 1 positions, because prediction starts from the end-of-text token and
ends with it: inputs [eot, t1 .. tn], targets [t1 .. tn, eot]. A window of P positions always makes
exactly ceil(P / seq) rows, whatever the seed, so that the rows of an epoch are counted by prefix
sums and nothing is ever dropped: padding is only what is left over in a window's last gaps.
"""

import bisect
from typing import Literal, NamedTuple

import numpy as np

from bigtrain.data.shuffle import hashes

Packing = Literal["best_fit", "concat"]


class Plan(NamedTuple):
  """The rows of a window. Row r holds the pieces [bounds[r], bounds[r + 1]), in this order."""

  bounds: np.ndarray  # (rows + 1,) int64.
  starts: np.ndarray  # (pieces,) int64: the first position of each piece, counted over the split.
  lengths: np.ndarray  # (pieces,) int32: positions of each piece.

  @property
  def nbytes(self) -> int:
    return self.bounds.nbytes + self.starts.nbytes + self.lengths.nbytes


def plan(offsets: np.ndarray, seq: int, packing: Packing, key: np.ndarray | None) -> Plan:
  """Plans the rows of one window.

  Args:
    offsets: (documents + 1,) the position at which each document starts, and the end of the last.
    seq: positions of a row.
    packing: `best_fit` keeps documents whole where they fit; `concat` cuts wherever a row ends.
    key: of this epoch and window; None is the fixed order of evaluation.
  """
  pieces = (_concat if packing == "concat" else _best_fit)(offsets, seq, key)
  row, starts, lengths = pieces
  rows = -(-int(offsets[-1] - offsets[0]) // seq)
  bounds = np.searchsorted(row, np.arange(rows + 1))
  return Plan(bounds, starts, lengths.astype(np.int32))


def _concat(offsets, seq, key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Shuffled documents end to end, cut every `seq`.

  Joined as a ring that is opened within the first document, so that even a single one is cut
  elsewhere in every epoch.
  """
  starts, lengths = offsets[:-1], np.diff(offsets)
  if key is not None:
    order = np.argsort(hashes(key, np.arange(len(starts))), kind="stable")
    starts, lengths = starts[order], lengths[order]
    opened = int(hashes(key, len(order))[0] % np.uint64(lengths[0]))
    starts = np.concatenate([starts[:1] + opened, starts[1:], starts[:1]])
    lengths = np.concatenate([lengths[:1] - opened, lengths[1:], [opened]])
  ends = np.cumsum(lengths)
  cuts = np.union1d(ends, np.arange(seq, ends[-1], seq))
  cuts = cuts[cuts > 0]
  begins = np.concatenate([[0], cuts[:-1]])
  document = np.searchsorted(ends, begins, side="right")
  within = begins - (ends - lengths)[document]
  return begins // seq, starts[document] + within, cuts - begins


def _best_fit(offsets, seq, key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Best-fit-decreasing bin packing, the method of Ding et al. 2024 (arXiv:2404.10830).

  Unlike there the number of rows is given: what fits into no gap is split over the widest ones.
  """
  starts, lengths = _cut_long(offsets, seq, key)
  full = lengths == seq
  starts, lengths, whole = starts[~full], lengths[~full], starts[full]
  rows = -(-int(offsets[-1] - offsets[0]) // seq) - len(whole)
  # Lengths blurred by up to a quarter keep the packing tight and change who shares a row.
  blurred = lengths
  if key is not None:
    blurred = lengths * (1 + (hashes(key, np.arange(len(lengths))) >> np.uint64(11)) / 2**55)
  order = np.argsort(-blurred, kind="stable")
  packed = _fill(starts[order].tolist(), lengths[order].tolist(), rows, seq)
  packed = packed[np.argsort(packed[:, 0], kind="stable")]
  row = np.concatenate([packed[:, 0], rows + np.arange(len(whole))])
  return (
    row,
    np.concatenate([packed[:, 1], whole]),
    np.concatenate([packed[:, 2], np.full(len(whole), seq)]),
  )


def _cut_long(offsets, seq, key) -> tuple[np.ndarray, np.ndarray]:
  """Cuts documents longer than a row every `seq` positions, from a random phase on."""
  lengths = np.diff(offsets)
  first = np.minimum(lengths, seq)
  if key is not None:
    phase = 1 + (hashes(key ^ np.uint64(1), np.arange(len(lengths))) % np.uint64(seq)).astype(int)
    first = np.where(lengths > seq, phase, first)
  count = 1 + -(-(lengths - first) // seq)
  document = np.repeat(np.arange(len(lengths)), count)
  nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
  begin = np.where(nth == 0, 0, first[document] + (nth - 1) * seq)
  end = np.minimum(first[document] + nth * seq, lengths[document])
  return offsets[document] + begin, end - begin


def _fill(starts: list[int], lengths: list[int], rows: int, seq: int) -> np.ndarray:
  """Puts pieces into `rows` rows of `seq` positions: (pieces, 3) of row, start, length."""
  # The gaps in ascending order, each one number: its width above, its row below.
  gaps = [seq << 32 | row for row in range(rows)]
  packed, homeless = [], []
  for start, length in zip(starts, lengths, strict=True):
    at = bisect.bisect_left(gaps, length << 32)
    if at == len(gaps):
      homeless.append((start, length))
      continue
    gap = gaps.pop(at)
    packed.append((gap & 0xFFFFFFFF, start, length))
    if (gap >> 32) > length:
      bisect.insort(gaps, gap - (length << 32))
  for start, length in homeless:
    while length:
      gap = gaps.pop()
      taken = min(length, gap >> 32)
      packed.append((gap & 0xFFFFFFFF, start, taken))
      start, length = start + taken, length - taken
      if (gap >> 32) > taken:
        bisect.insort(gaps, gap - (taken << 32))
  return np.array(packed, np.int64).reshape(-1, 3)
