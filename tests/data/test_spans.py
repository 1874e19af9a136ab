import dataclasses
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from bigtrain.config import Refused
from bigtrain.data.shuffle import hashes, key_of
from bigtrain.data.sources import Files
from bigtrain.data.spans import Spans, counts, gaps_of, joined, split
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE, Bytes, TokenizerFile


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("spans")
    patch.setenv("BIGTRAIN_CACHE", str(folder / "cache"))
    texts = [" ".join(f"w{i}x{j}" for j in range(40 if i % 3 else 5)) for i in range(150)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    yield Files(pattern=str(folder / "text.jsonl"), validation=0.3)


def config(source, **fields):
  c = dataclasses.replace(Spans(source=source, tokenizer=Bytes(), seq=64), **fields)
  c.check()
  return c


def whole(data, batch, i):
  """The text of a row again: each sentinel of the source replaced by its span."""
  sentinels = set(data.tokenizer.sentinels.tolist())
  spans, now = {}, None
  for token in batch["targets"][i][batch["target_segments"][i] > 0][:-1].tolist():
    if token in sentinels:
      now = token
      spans[now] = []
    else:
      spans[now].append(token)
  text = []
  for token in batch["tokens"][i][batch["segments"][i] > 0][:-1].tolist():
    text += spans.pop(token) if token in sentinels else [token]
  assert not spans
  return text


def random_spans_helper(inputs_length, noise_density, mean):
  """As t5/data/preprocessors.py has it."""

  def of(tokens_length):
    num_noise_tokens = round(tokens_length * noise_density)
    num_nonnoise_tokens = tokens_length - num_noise_tokens
    num_noise_spans = round(num_noise_tokens / mean)
    return num_nonnoise_tokens + num_noise_spans + 1, num_noise_tokens + num_noise_spans + 1

  tokens_length = inputs_length
  while of(tokens_length + 1)[0] <= inputs_length:
    tokens_length += 1
  return tokens_length, of(tokens_length)[1]


def test_lengths_are_those_of_t5(source):
  assert config(source, seq=512).lengths() == (568, 114)  # As its configs have it.
  for seq, noise, span in ((64, 0.15, 3.0), (128, 0.15, 3.0), (1024, 0.5, 3.0), (512, 0.15, 10.0)):
    c = config(source, seq=seq, noise=noise, span=span, sentinels=300)
    assert c.lengths() == random_spans_helper(seq, noise, span)


def test_rows_are_full_and_end_with_end_of_text(source):
  data = config(source).make(0)
  batch, spec = data.batch(0, 200), data.spec(200)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (s.shape, s.dtype) for k, s in spec.items()
  }
  sources, targets = batch["segments"].sum(1), batch["target_segments"].sum(1)
  full = sources >= 63
  assert full.mean() > 0.95 and (targets[full] == spec["targets"].shape[1]).all()
  for i, (n, m) in enumerate(zip(sources, targets, strict=True)):
    assert batch["tokens"][i, n - 1] == batch["targets"][i, m - 1] == data.tokenizer.eot
    assert not batch["tokens"][i, n:].any() and not batch["targets"][i, m:].any()
    assert batch["positions"][i, :n].tolist() == list(range(n))
    assert batch["target_positions"][i, :m].tolist() == list(range(m))
  np.testing.assert_array_equal(batch["weights"], batch["target_segments"])


def test_source_and_targets_together_are_the_text(source):
  c = config(source)
  data, plain = c.make(3), TextData(source=source, seq=c.lengths()[0]).make(3)
  batch, rows = data.batch(7, 50), plain.batch(7, 50)
  for i in range(50):
    assert whole(data, batch, i) == rows["tokens"][i][rows["segments"][i] > 0].tolist()
  first = batch["targets"][:, 0]
  assert (first == data.tokenizer.sentinels[0]).all() and first[0] == data.tokenizer.vocab - 1


def test_a_share_is_taken_out_in_spans_of_the_mean_length_at_random_places():
  n, rows = 568, 400
  taken, spans = counts(n, 0.15, 3.0)
  assert (taken, spans) == (85, 28)
  found = np.stack([gaps_of(n, 0.15, 3.0, hashes(key_of(1), i)) for i in range(rows)])
  assert (found.sum(axis=1) == taken).all()
  begins = found & ~np.pad(found[:, :-1], ((0, 0), (1, 0)))
  assert (begins.sum(axis=1) == spans).all()
  assert not found[:, 0].any() and found[:, -1].all()  # Kept ones first, as published.
  # Every way of cutting 85 into 28 is as likely: the first part is 1 in 27 of 84 cases.
  lengths = [np.diff(np.flatnonzero(np.diff(row, prepend=0, append=0)))[::2] for row in found * 1]
  assert np.mean(np.concatenate(lengths) == 1) == pytest.approx(27 / 84, abs=0.02)
  share = found[:, 20:-20].mean(axis=0)
  assert abs(share.mean() - 0.15) < 0.005 and share.std() < 0.03


@pytest.mark.parametrize(
  ("n", "noise", "expected"),
  [(1, 0.15, (0, 1)), (2, 0.15, (1, 1)), (10, 0.9, (9, 1)), (3, 0.1, (1, 1))],
)
def test_short_texts_have_one_span_at_least_and_keep_a_token(n, noise, expected):
  assert counts(n, noise, 3.0) == expected
  gaps = gaps_of(n, noise, 3.0, key_of(0))
  assert len(gaps) == n and gaps.sum() == expected[0]


def test_each_gap_becomes_its_sentinel():
  text, gaps = np.arange(10, 18), np.array([0, 1, 1, 0, 0, 1, 0, 1], bool)
  found, spans = split(text, gaps, np.array([99, 98, 97, 96]))
  assert found.tolist() == [10, 99, 13, 14, 98, 16, 97]
  assert spans.tolist() == [99, 11, 12, 98, 15, 97, 17]


def test_gaps_are_pure_in_seed_and_example_and_new_in_every_epoch(source):
  c = config(source)
  data, again, other = c.make(0), c.make(0), c.make(1)
  batch = data.batch(40, 16)
  for name, values in again.batch(48, 8, slice(2, 5)).items():
    np.testing.assert_array_equal(values, batch[name][10:13])
  assert (other.batch(40, 16)["tokens"] != batch["tokens"]).any()
  n = data.examples()
  texts = [
    {tuple(whole(data, b, i)): b["tokens"][i].tobytes() for i in range(n)}
    for b in (data.batch(0, n), data.batch(n, n))
  ]
  both = texts[0].keys() & texts[1].keys()
  assert not both or np.mean([texts[0][t] == texts[1][t] for t in both]) < 0.1


def test_held_out_gaps_are_the_same_for_every_run_and_each_row_comes_once(source):
  a, b = config(source).make(0), config(source).make(7)
  n = a.eval_examples()
  rows, halves = a.eval_batch(0, n + 3), [b.eval_batch(0, 4), b.eval_batch(4, n - 1)]
  for name, values in rows.items():
    np.testing.assert_array_equal(values, np.concatenate([h[name] for h in halves]))
    assert not values[n:].any(), name
  assert rows["weights"][:n].any(axis=1).all()


def test_sentinels_are_the_tokenizers_own_or_the_highest_ids(source, tmp_path):
  assert config(source).vocabulary() == 257 + 100
  assert config(source).make(0).tokenizer.sentinels[:2].tolist() == [356, 355]
  own = BPE(vocab=300, special=tuple(f"<extra_id_{i}>" for i in range(12)))
  c = config(source, tokenizer=own)
  ids = c.make(0).tokenizer.sentinels
  assert c.vocabulary() == 300 and set(ids.tolist()) <= set(range(13))
  tokenizer = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "w": 2}, unk_token="<unk>"))
  tokenizer.pre_tokenizer = WhitespaceSplit()
  tokenizer.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True) for i in (2, 1, 0)])
  tokenizer.save(str(tmp_path / "t.json"))
  file = TokenizerFile(path=str(tmp_path / "t.json"), eot="</s>")
  c = config(source, tokenizer=file, seq=20)
  assert c.vocabulary() == 6
  spelling = c.spelling(file.make("", list, tmp_path))
  assert spelling.sentinels.tolist() == [5]
  assert spelling.encode("w <extra_id_0> w").tolist() == [2, 5, 2]
  with pytest.raises(Refused, match=r"no special token '<extra_id_3>'"):
    config(source, tokenizer=file, seq=128).spelling(file.make("", list, tmp_path))


def test_a_text_with_sentinels_is_encoded_and_decoded(source):
  tokenizer = config(source).make(0).tokenizer
  text = "<extra_id_0>né<extra_id_1><extra_id_12> end"
  ids = tokenizer.encode(text)
  assert ids.tolist() == [356, *"né".encode(), 355, 344, *b" end"]
  assert tokenizer.decode(np.append(ids, tokenizer.eot)) == text
  assert tokenizer.decode([]) == "" and len(tokenizer.encode("")) == 0
  assert tokenizer.id_of("<extra_id_1>") == 355
  assert len(tokenizer.byte_lengths()) == len(tokenizer.word_starts()) == tokenizer.vocab
  with pytest.raises(Refused, match="no <extra_id_100>: sentinels are <extra_id_0> to 99"):
    tokenizer.encode("<extra_id_100>")


def test_what_was_sampled_fills_the_gaps_of_a_prompt():
  prompt = "It<extra_id_0> truth<extra_id_1>."
  assert joined(prompt, "<extra_id_0> is a<extra_id_1> known") == "It is a truth known."
  assert joined(prompt, "<extra_id_0> is a") == "It is a truth<extra_id_1>."
  assert joined("It was", " so") == "It was so"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"seq": 7}, "at least 8 tokens"),
    ({"noise": 1.0}, "between 0 and 1"),
    ({"span": 0.5}, "1 token or more"),
    ({"sentinels": 2}, r"have 3 spans but there are 2 sentinels; give data\.sentinels 3"),
    (
      {"tokenizer": BPE(special=("<extra_id_0>",))},
      r"have 3 spans but there are 1 sentinels; give tokenizer\.special 3",
    ),
  ],
)
def test_what_cannot_have_gaps_is_refused(source, fields, message):
  with pytest.raises(Refused, match=message):
    config(source, **fields)
