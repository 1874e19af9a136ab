import dataclasses
import json

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.masked import SPECIAL, MaskedText, chosen
from bigtrain.data.shuffle import hashes
from bigtrain.data.sources import Files
from bigtrain.data.tokenizers import BPE, Bytes

WORDS = 120  # Of each document; the document's number stands in every word.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Documents of numbered words, so that any token tells where it is from; some are short."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("masked")
    patch.setenv("BIGTRAIN_CACHE", str(folder / "cache"))
    lines = []
    for i in range(80):
      words = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}{j:03}" for j in range(WORDS if i % 4 else 9)]
      lines.append(json.dumps({"text": " " + " ".join(words)}))
    (folder / "text.jsonl").write_text("\n".join(lines))
    yield Files(pattern=str(folder / "text.jsonl"), validation=0.3)


def config(source, **fields):
  c = MaskedText(source=source, tokenizer=BPE(vocab=400, special=SPECIAL), seq=64)
  c = dataclasses.replace(c, **fields)
  c.check()
  return c


def text(data, ids):
  return data.tokenizer.decode(ids)


def pieces(batch, name="targets"):
  for i, segments in enumerate(batch["segments"]):
    for segment in range(1, segments.max() + 1):
      yield batch[name][i][segments == segment]


def masked(batch):
  return batch["weights"] > 0


def test_every_document_of_a_row_is_closed_by_the_special_tokens(source):
  data = config(source).make(0)
  batch = data.batch(0, 64)
  cls, sep, mask = (data.tokenizer.id_of(t) for t in SPECIAL)
  closed = [p for p in pieces(batch) if len(p) > 1]
  assert len(closed) > 64
  assert all(p[0] == cls and p[-1] == sep for p in closed)
  assert not any(np.isin(p[1:-1], [cls, sep, mask, data.tokenizer.eot]).any() for p in closed)
  assert not batch["token_types"].any() and set(batch) == set(data.spec(64))
  assert {k: v.dtype for k, v in batch.items()} == {k: s.dtype for k, s in data.spec(64).items()}


def test_fifteen_percent_are_guessed_and_of_these_eighty_are_masked_and_ten_are_any_token(source):
  data = config(source).make(0)
  batch = data.batch(0, 2000)
  cls, sep, mask = (data.tokenizer.id_of(t) for t in SPECIAL)
  of_text = (batch["segments"] > 0) & ~np.isin(batch["targets"], [cls, sep])
  counts = masked(batch).sum(axis=1)
  np.testing.assert_array_equal(counts, np.maximum(np.rint(0.15 * of_text.sum(axis=1)), 1))
  assert not (masked(batch) & ~of_text).any()
  tokens, targets = batch["tokens"][masked(batch)], batch["targets"][masked(batch)]
  assert abs((tokens == mask).mean() - 0.8) < 0.01
  # 10% any of 400 tokens, which hits the same one once in 400, and 10% unchanged.
  assert abs((tokens == targets).mean() - 0.1) < 0.01
  others = tokens[(tokens != mask) & (tokens != targets)]
  assert abs(len(others) / len(tokens) - 0.1) < 0.01 and len(np.unique(others)) > 300
  unchanged = ~masked(batch)
  np.testing.assert_array_equal(batch["tokens"][unchanged], batch["targets"][unchanged])
  # Every place of a row is chosen about equally often.
  share_T = masked(batch).sum(axis=0) / of_text.sum(axis=0).clip(1)
  assert share_T[1:60].std() < 0.03


def test_masks_are_pure_in_seed_and_example_and_new_in_every_epoch(source):
  c = config(source)
  data, again, other = c.make(0), c.make(0), c.make(1)
  batch = data.batch(40, 16)
  for name, values in again.batch(48, 8, slice(2, 5)).items():
    np.testing.assert_array_equal(values, batch[name][10:13])
  assert (other.batch(40, 16)["tokens"] != batch["tokens"]).any()
  # A text that both epochs have whole is masked elsewhere in the second.
  n, masks = data.examples(), []
  for epoch in range(2):
    b = data.batch(epoch * n, n)
    found = zip(pieces(b), pieces(b, "weights"), strict=True)
    masks.append({ids.tobytes(): where.tobytes() for ids, where in found if len(ids) > 20})
  first, second = masks
  both = first.keys() & second.keys()
  assert len(both) > 5 and np.mean([first[ids] == second[ids] for ids in both]) < 0.2


@pytest.mark.parametrize("pairs", [False, True])
def test_held_out_masks_are_the_same_for_every_run_and_each_row_comes_once(source, pairs):
  c = config(source, next_sentence=pairs)
  a, b = c.make(0), c.make(7)
  n = a.eval_examples()
  whole, halves = a.eval_batch(0, n + 3), [b.eval_batch(0, 4), b.eval_batch(4, n - 1)]
  for name, values in whole.items():
    np.testing.assert_array_equal(values, np.concatenate([h[name] for h in halves])[: n + 3])
    assert not values[n:].any(), name
  assert masked(whole)[:n].any(axis=1).all()


def test_whole_words_are_guessed_together_or_not_at_all(source):
  data = config(source, whole_words=True).make(0)
  batch = data.batch(0, 500)
  starts, special = data.tokenizer.word_starts(), [data.tokenizer.id_of(t) for t in SPECIAL[:2]]
  split = several = 0
  for targets, segments, where in zip(
    batch["targets"], batch["segments"], masked(batch), strict=True
  ):
    fixed = np.isin(targets, special) | (segments == 0)
    begins = starts[targets] | fixed | np.roll(fixed, 1)
    for word in np.split(np.arange(len(targets)), np.flatnonzero(begins)[1:]):
      split += where[word].any() != where[word].all()
      several += where[word].all() and len(word) > 1
    assert 1 <= where.sum() <= max(0.15 * (~fixed).sum() + 0.5, 6)
  assert split == 0 and several > 500


def test_pairs_follow_half_of_the_time_and_types_tell_the_texts(source):
  data = config(source, next_sentence=True).make(0)
  batch = data.batch(0, 400)
  assert batch["next_sentence"].shape == (400,) == data.spec(400)["next_sentence"].shape
  assert abs(batch["next_sentence"].mean() - 0.5) < 0.06
  cls, sep, _ = (data.tokenizer.id_of(t) for t in SPECIAL)
  follows = []
  for i, line in enumerate(batch["targets"]):
    n = batch["segments"][i].sum()
    first_end, second_end = np.flatnonzero(line == sep)
    assert line[0] == cls and second_end == n - 1 and not line[n:].any()
    wanted = np.arange(64)
    np.testing.assert_array_equal(batch["token_types"][i], (wanted > first_end) & (wanted < n))
    np.testing.assert_array_equal(batch["positions"][i], np.where(wanted < n, wanted, 0))
    a = text(data, line[1:first_end]).split()
    b = text(data, line[first_end + 1 : second_end]).split()
    if not (a and b and len(a[-1]) == len(b[0]) == 5):
      continue  # Cut within a word at the row's edge.
    following = a[-1][:2] == b[0][:2] and int(a[-1][2:]) + 1 == int(b[0][2:])
    # Classes as in BERT's checkpoints, whose head this trains: 0 is IsNext.
    follows.append(following == (batch["next_sentence"][i] == 0))
  assert len(follows) > 300 and np.mean(follows) > 0.99


def test_neither_length_nor_a_cut_word_tells_which_pairs_follow(source):
  data = config(source, next_sentence=True).make(0)
  batch = data.batch(0, 1000)
  long = np.flatnonzero(batch["segments"].sum(axis=1) > 40)
  lengths = batch["token_types"].sum(axis=1)[long]
  follows = batch["next_sentence"][long] == 0
  assert abs(lengths[follows].mean() - lengths[~follows].mean()) < 3
  first = (batch["token_types"] == 1).argmax(axis=1)
  starts = data.tokenizer.word_starts()[batch["targets"][np.arange(1000), first]]
  there = batch["token_types"].sum(axis=1) > 1
  for kind in (0, 1):
    assert starts[there & (batch["next_sentence"] == kind)].mean() > 0.97


def test_a_tie_of_words_is_broken_by_nothing_and_one_word_is_always_taken():
  fixed = np.array([[1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], bool)
  starts = np.array([[1, 1, 0, 0, 0, 1]] * 2, bool)
  found = chosen(0.15, fixed, starts, hashes(0, np.arange(2)))
  assert found.tolist() == [[False, True, True, True, True, False], [False] * 6]


def test_settings_and_tokenizers_that_cannot_mask_are_refused(source):
  with pytest.raises(Refused, match=r"bytes have no \[MASK\]"):
    config(source, tokenizer=Bytes())
  with pytest.raises(Refused, match=r"no \[SEP\]; add it to tokenizer\.special"):
    config(source, tokenizer=BPE(special=("[CLS]", "[MASK]")))
  with pytest.raises(Refused, match="between 0 and 1"):
    config(source, share=0.0)
  with pytest.raises(Refused, match="at most 1 in all"):
    config(source, masked=0.8, random=0.3)
  with pytest.raises(Refused, match="at least 8"):
    config(source, seq=4)
