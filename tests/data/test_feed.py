import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bigtrain.config import Refused
from bigtrain.data.feed import Feed, Sizes, needed_rows, put
from bigtrain.experiment import Data
from bigtrain.mesh import Mesh

pytestmark = pytest.mark.smoke

SEQ = 8


class Counting(Data):
  """Token t of example i is 100 * i + t; remembers which rows were asked for."""

  def __init__(self, fails_at=None):
    self.asked = []
    self.fails_at = fails_at

  def spec(self, size):
    return {"tokens": jax.ShapeDtypeStruct((size, SEQ), np.int32)}

  def batch(self, example, size, rows=None):
    examples = example + np.arange(size)[rows or slice(None)]
    self.asked += examples.tolist()
    if self.fails_at in examples:
      raise Refused(f"example {self.fails_at} is missing")
    return {"tokens": (100 * examples[:, None] + np.arange(SEQ)).astype(np.int32)}

  def eval_examples(self):
    return 0

  def eval_batch(self, example, size, rows=None):
    return self.batch(example, size, rows)


def sharded(spec, **axes):
  return NamedSharding(Mesh(**axes).make(), PartitionSpec(*spec))


BATCH = ("data", "fsdp")
SHARDINGS = {
  "batch over all": lambda: sharded((BATCH, None), data=2, fsdp=4),
  "tensor of 8": lambda: sharded((BATCH, None), fsdp=1, tensor=8),
  "all three": lambda: sharded((BATCH,), data=2, fsdp=2, tensor=2),
  "slices of T": lambda: sharded((BATCH, "tensor"), data=2, fsdp=1, tensor=4),
  "replicated": lambda: sharded((), fsdp=8),
  "one device": lambda: None,
}


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS.keys())
def test_the_global_batch_is_whole_and_every_row_is_computed_once(sharding):
  data, sharding = Counting(), sharding()
  batch = put(lambda rows: data.batch(7, 16, rows), 16, sharding)
  assert np.array_equal(batch["tokens"], Counting().batch(7, 16)["tokens"])
  assert sharding is None or batch["tokens"].sharding == sharding
  assert sorted(data.asked) == list(range(7, 23))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("name", ["batch over all", "tensor of 8", "all three", "slices of T"])
def test_processes_together_ask_for_the_same_bytes_as_one(name, processes):
  sharding = SHARDINGS[name]()
  indices = sharding.devices_indices_map((16, SEQ))
  devices = np.array_split(np.array(sharding.mesh.devices.flat), processes)
  whole = Counting().batch(7, 16)["tokens"]
  seen = np.zeros_like(whole)
  for own in devices:
    data = Counting()
    for first, last in needed_rows([indices[d] for d in own], 16):
      seen[first:last] = data.batch(7, 16, slice(first, last))["tokens"]
    held = {row for d in own for row in range(*indices[d][0].indices(16)[:2])}
    assert sorted(data.asked) == sorted(7 + row for row in held)
  assert np.array_equal(seen, whole)


def test_rows_that_lie_apart_are_asked_for_apart():
  indices = [(slice(a, b),) for a, b in [(4, 6), (0, 2), (2, 4), (9, 12), (9, 12)]]
  assert needed_rows(indices, 16) == [(0, 6), (9, 12)]
  assert needed_rows([(slice(None), slice(0, 4))], 16) == [(0, 16)]


def test_sizes_follow_their_stages():
  sizes = Sizes(4, ((10, 8), (20, 16)))
  assert [sizes.at(s) for s in (0, 9, 10, 19, 20, 99)] == [4, 4, 8, 8, 16, 16]
  for first, last in ((0, 0), (3, 30), (10, 20), (12, 15), (25, 40)):
    assert sizes.between(first, last) == sum(map(sizes.at, range(first, last)))


def test_the_feed_starts_anywhere_and_follows_the_sizes():
  sizes, sharding = Sizes(8, ((5, 16),)), sharded((BATCH,), fsdp=8)
  example = 40
  with Feed(Counting(), sizes, sharding, step=3, example=example, stop=9) as feed:
    for step in range(3, 9):
      size = sizes.at(step)
      expected = Counting().batch(example, size)["tokens"]
      assert np.array_equal(next(feed)["tokens"], expected)
      example += size
    with pytest.raises(StopIteration):
      next(feed)


def test_a_failure_while_reading_reaches_the_reader():
  with Feed(Counting(fails_at=21), Sizes(8), None, step=0, example=0, stop=9) as feed:
    assert [int(next(feed)["tokens"][0, 0]) for _ in range(2)] == [0, 800]
    with pytest.raises(Refused, match="example 21"):
      next(feed)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_stops_all_threads_at_once(taken):
  before = threading.active_count()
  data = Counting()
  feed = Feed(data, Sizes(8), None, step=0, example=0, stop=10**6)
  for _ in range(taken):
    next(feed)
  started = time.perf_counter()
  feed.close()
  feed.close()
  assert time.perf_counter() - started < 1
  deadline = time.perf_counter() + 5
  while threading.active_count() > before and time.perf_counter() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before
  assert len(data.asked) < 8 * 30  # What is read ahead is bounded.
  with pytest.raises(StopIteration):
    next(feed)


def test_a_batch_that_is_ready_is_not_waited_for():
  with Feed(Counting(), Sizes(8), None, step=0, example=0, stop=100) as feed:
    waits = []
    for _ in range(20):
      time.sleep(0.01)
      next(feed)
      waits.append(feed.wait)
  assert np.median(waits) < 0.002


def test_a_slow_source_shows_in_the_wait():
  data = Counting()
  quick = data.batch
  data.batch = lambda *a: time.sleep(0.05) or quick(*a)
  with Feed(data, Sizes(8), None, step=0, example=0, stop=30) as feed:
    waits = [(next(feed), feed.wait)[1] for _ in range(20)]
  assert np.mean(waits[10:]) > 0.01
