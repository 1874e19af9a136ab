"""Feed: from rows on the host to global arrays on the devices, ahead of the step that needs them.

A process computes only the rows that its devices hold, by the batch sharding's own indices and
never by a process number: mesh axes other than the batch's may span processes. Threads compute the
rows of a batch and move them to the devices; closing the feed stops them.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bigtrain.experiment import Data
from bigtrain.phases import within

READ_THREADS = 2  # Planning holds Python's lock, copying does not: a second thread is of use.
AHEAD = 3  # Batches on the devices, besides the one in use.

Batch = dict[str, np.ndarray]
Span = tuple[int, int]  # Rows [first, last) of the global batch.


class Sizes(NamedTuple):
  """The global batch as a function of the step."""

  batch: int  # Rows.
  stages: tuple[tuple[int, int], ...] = ()  # (step, batch): that batch from that step on.

  def at(self, step: int) -> int:
    """The size of the batch that update `step` (from 0) consumes."""
    return max(((s, b) for s, b in self.stages if s <= step), default=(0, self.batch))[1]

  def between(self, first: int, last: int) -> int:
    """The examples that the steps [first, last) consume, without walking over them."""
    edges = sorted({first, last, *(s for s, _ in self.stages if first < s < last)})
    return sum((b - a) * self.at(a) for a, b in itertools.pairwise(edges))


def needed_rows(indices: Iterable[Any], size: int) -> list[Span]:
  """The rows that some devices hold, as disjoint spans in order, each as long as it can be.

  Args:
    indices: each device's index into the global array, as `Sharding.devices_indices_map` gives it.
    size: rows of the global batch.
  """
  spans: list[Span] = []
  for first, last in sorted({index[0].indices(size)[:2] for index in indices}):
    if spans and first <= spans[-1][1]:
      spans[-1] = spans[-1][0], max(last, spans[-1][1])
    else:
      spans.append((first, last))
  return spans


def read_rows(
  batch: Callable[[slice], Batch], size: int, sharding: NamedSharding | None
) -> dict[Span, Batch]:
  """Computes the rows that this process needs, each once.

  Args:
    batch: gives the named rows of the global batch.
    size: rows of the global batch.
    sharding: of every array of the batch, over its first dims; None for a single device.
  """
  spans = [(0, size)]
  if sharding is not None:
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    spans = needed_rows(by_row.addressable_devices_indices_map((size,)).values(), size)
  return {span: batch(slice(*span)) for span in spans}


def to_devices(
  parts: dict[Span, Batch], size: int, sharding: NamedSharding | None
) -> dict[str, jax.Array]:
  """Global arrays of `size` rows from the parts that `read_rows` gave."""
  if sharding is None:
    return jax.device_put(parts[0, size])

  def whole(name: str, example: np.ndarray) -> jax.Array:
    def rows(index: Any) -> np.ndarray:
      first, last, _ = index[0].indices(size)
      start, part = next((s, p) for (s, end), p in parts.items() if s <= first and last <= end)
      return part[name][(slice(first - start, last - start), *index[1:])]

    return jax.make_array_from_callback((size, *example.shape[1:]), sharding, rows)

  return {name: whole(name, value) for name, value in next(iter(parts.values())).items()}


def put(
  batch: Callable[[slice], Batch], size: int, sharding: NamedSharding | None
) -> dict[str, jax.Array]:
  """One global batch on the devices, at once; see `read_rows` for the arguments."""
  return to_devices(read_rows(batch, size, sharding), size, sharding)


class Feed(Iterator[dict[str, jax.Array]]):
  """The batches of the steps [step, stop) on the devices, prepared ahead.

  Args:
    data: the dataset, possibly in stages.
    sizes: the global batch of each step.
    sharding: of every array of the batch; None for a single device.
    step: the first step.
    example: the global example index at which that step begins.
    stop: one past the last step.
  """

  first: int  # The step of the first batch.
  # The example at which the batch of update `step` (from 0) begins; of no step before `first`.
  example_at: Callable[[int], int]
  wait = 0.0  # Seconds that the last `next` took: how long the step had to wait for its batch.
  shape: tuple[int, ...] = ()  # Of the first array of the last batch.
  lengths: tuple[
    int, ...
  ] = ()  # Tokens of its rows; after them of its targets if they have others.

  def __init__(
    self,
    data: Data,
    sizes: Sizes,
    sharding: NamedSharding | None,
    *,
    step: int,
    example: int,
    stop: int,
  ):
    self.first = step
    self.example_at = lambda at: example + sizes.between(step, at)

    def read(at: int) -> dict[str, jax.Array]:
      size, start = sizes.at(at), self.example_at(at)
      return put(lambda rows: data.stage(at).batch(start, size, rows), size, sharding)

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=AHEAD)
    self._batches: Any = iter(grain.MapDataset.range(step, stop).map(read).to_iter_dataset(options))
    self._batches.start_prefetch()

  def __next__(self) -> dict[str, jax.Array]:
    if self._batches is None:
      raise StopIteration
    started = time.perf_counter()
    with within("input"):
      batch = next(self._batches)
    self.wait = time.perf_counter() - started
    # Beside rows of tokens there may be one number a row, such as a label.
    self.shape = max((x.shape for x in batch.values()), key=len)
    of_rows = self.shape[1:2]
    of_targets = batch["targets"].shape[1:2] if "targets" in batch else of_rows
    self.lengths = of_rows if of_targets == of_rows else of_rows + of_targets
    return batch

  def close(self) -> None:
    """Stops the threads and drops what they prepared; there is no next batch."""
    if self._batches is not None:
      self._batches.close()
    self._batches = None

  def __enter__(self) -> "Feed":
    return self

  def __exit__(self, *_) -> None:
    self.close()
