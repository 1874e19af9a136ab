"""Rows over a stream whose token at position p is p: every check reads off where a token was."""

import concurrent.futures

import numpy as np
import pytest

from bigtrain.data import rows as rows_module
from bigtrain.data.rows import WINDOW, Rows

PACKINGS = ["best_fit", "concat"]


def make(lengths, seq, packing="best_fit", seed=0):
  """Rows of documents with these numbers of positions, and the offsets."""
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = np.arange(offsets[-1] + 1, dtype=np.uint32)
  windows = np.append(offsets[:-1:WINDOW], offsets[-1])
  made = Rows(tokens, offsets, windows, len(lengths), seq=seq, packing=packing, seed=seed)
  return made, offsets


def some_lengths(documents=2500, mean=20, seed=0):
  drawn = np.random.default_rng(seed).lognormal(np.log(mean), 1.0, documents)
  return np.maximum(2, drawn.astype(int))


def real(batch):
  return batch["tokens"][batch["weights"] > 0]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", [0, None])
def test_an_epoch_has_every_position_exactly_once(packing, seed):
  rows, offsets = make(some_lengths(), 64, packing, seed)
  batch = rows(np.arange(rows.count))
  assert np.array_equal(np.sort(real(batch)), np.arange(offsets[-1]))


@pytest.mark.parametrize("packing", PACKINGS)
def test_targets_are_the_tokens_that_follow_and_padding_is_zero(packing):
  rows, _ = make(some_lengths(), 64, packing)
  batch = rows(np.arange(rows.count))
  used = batch["weights"] > 0
  assert np.array_equal(batch["targets"][used], batch["tokens"][used] + 1)
  assert np.array_equal(used, batch["segments"] > 0)
  assert all(not values[~used].any() for values in batch.values())


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_segment_is_one_run_of_one_document_with_positions_from_zero(packing):
  rows, offsets = make(some_lengths(), 64, packing)
  batch = rows(np.arange(rows.count))
  for tokens, segments, positions in zip(
    batch["tokens"], batch["segments"], batch["positions"], strict=True
  ):
    assert segments[0] == 1
    for segment in range(1, segments.max() + 1):
      run = tokens[segments == segment]
      assert np.array_equal(run, run[0] + np.arange(len(run)))
      assert len(set(np.searchsorted(offsets, run, side="right"))) == 1
      assert np.array_equal(positions[segments == segment], np.arange(len(run)))


def test_best_fit_keeps_documents_whole_that_fit_into_a_row():
  lengths = some_lengths(mean=20)
  rows, offsets = make(lengths, 256)
  batch = rows(np.arange(rows.count))
  begins = batch["tokens"][(batch["positions"] == 0) & (batch["weights"] > 0)]
  documents = np.searchsorted(offsets, begins, side="right") - 1
  split = np.bincount(documents, minlength=len(lengths)) > 1
  assert split[lengths <= 256].mean() < 0.01
  assert split[lengths > 256].all()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mean", [3, 20, 500])
def test_padding_is_below_one_percent(packing, mean):
  rows, offsets = make(some_lengths(6000, mean), 128, packing)
  assert rows.count * 128 < 1.01 * offsets[-1] + 128


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_rows_of_an_epoch_do_not_depend_on_the_seed(packing):
  assert len({make(some_lengths(), 64, packing, seed)[0].count for seed in (0, 1, None)}) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_and_seeds_differ_in_order_and_in_cuts(packing):
  lengths = some_lengths()
  rows, _ = make(lengths, 64, packing)
  n = rows.count
  first, second = rows(np.arange(n)), rows(n + np.arange(n))
  other = make(lengths, 64, packing, seed=1)[0](np.arange(n))
  contents = [{row.tobytes() for row in b["tokens"]} for b in (first, second, other)]
  # Many rows of a single whole piece may come again, most rows must not.
  assert len(contents[0] & contents[1]) < n / 4
  assert len(contents[0] & contents[2]) < n / 4
  assert np.array_equal(np.sort(real(second)), np.sort(real(first)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_one_long_document_is_cut_elsewhere_in_every_epoch(packing):
  rows, _ = make([1000], 64, packing)
  epochs = [rows(e * rows.count + np.arange(rows.count)) for e in range(8)]
  cuts = [set(b["tokens"][(b["positions"] == 0) & (b["weights"] > 0)]) for b in epochs]
  assert len({frozenset(c) for c in cuts}) >= 6  # Of 64 phases, two may be equal.


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths", [[2], [1], [2, 2], [64], [65], [2] * 1025])
def test_tiny_corpora_work(packing, lengths):
  rows, offsets = make(lengths, 64, packing)
  for epoch in range(3):
    batch = rows(epoch * rows.count + np.arange(rows.count))
    assert np.array_equal(np.sort(real(batch)), np.arange(offsets[-1]))
  assert rows(np.arange(17))["tokens"].shape == (17, 64)  # A batch may span many epochs.


@pytest.mark.parametrize("packing", PACKINGS)
def test_any_subset_of_examples_gives_the_same_rows_in_any_state(packing):
  lengths = some_lengths()
  whole = make(lengths, 64, packing)[0](np.arange(3000))
  rows, _ = make(lengths, 64, packing)  # With nothing planned yet.
  for chosen in ([2999], [5, 4, 3], [700, 1400, 2100, 0]):
    part = rows(np.array(chosen))
    assert all(np.array_equal(part[name], whole[name][chosen]) for name in whole)


def test_many_groups_and_chunks_are_shuffled_without_loss(monkeypatch):
  monkeypatch.setattr(rows_module, "CHUNK", 4)
  monkeypatch.setattr(rows_module, "GROUP", 64)
  rows, offsets = make(some_lengths(), 64)
  batch = rows(np.arange(rows.count))
  assert np.array_equal(np.sort(real(batch)), np.arange(offsets[-1]))
  # Rows of one group come from all over the split.
  group = batch["tokens"][:64, 0] / offsets[-1]
  assert np.histogram(group, bins=4, range=(0, 1))[0].min() > 3


def test_threads_and_forgotten_plans_change_nothing(monkeypatch):
  lengths = some_lengths(6000)
  expected = make(lengths, 64)[0](np.arange(640))["tokens"]
  monkeypatch.setattr(rows_module, "PLAN_BYTES", 1)
  rows, _ = make(lengths, 64)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: rows(i * 16 + np.arange(16))["tokens"], range(40)))
  assert np.array_equal(np.concatenate(found), expected)
  assert len(rows._plans) == 1


def test_fixed_order_ends_in_padding():
  rows, _ = make(some_lengths(300), 64, seed=None)
  batch = rows(rows.count - 2 + np.arange(5))
  assert batch["weights"][:2].any(axis=1).all()
  assert not any(values[2:].any() for values in batch.values())
