import itertools
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data import cache
from bigtrain.data.cache import prepare
from bigtrain.data.sources import Files
from bigtrain.data.tokenizers import BPE, Bytes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  lines = [json.dumps({"text": f"document {i} " * (1 + i % 7)}) for i in range(3000)]
  (folder / "a.jsonl").write_text("\n".join(lines[:1500]))
  (folder / "b.jsonl").write_text("\n".join(lines[1500:]))
  return folder


@pytest.fixture
def builds(monkeypatch):
  """The folders that were built."""
  done, build = [], cache.build

  def counted(source, inputs, tokenizer, folder):
    done.append(folder)
    return build(source, inputs, tokenizer, folder)

  monkeypatch.setattr(cache, "build", counted)
  return done


def texts(prepared):
  """The documents of each split, decoded."""
  found = {}
  for name in ("train", "validation"):
    split = prepared.split(name)
    tokens, offsets = split.tokens[:], split.offsets[:]
    spans = itertools.pairwise(offsets)
    found[name] = [prepared.tokenizer.decode(tokens[a + 1 : b]) for a, b in spans]
    # An end-of-text before the first document and after each.
    assert (tokens[offsets] == prepared.tokenizer.eot).all()
  return found


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE(vocab=300)])
def test_every_document_is_in_one_split_whole_and_in_order(corpus, tokenizer):
  prepared = prepare(Files(pattern=str(corpus), validation=0.1), tokenizer)
  found = texts(prepared)
  expected = [
    json.loads(line)["text"]
    for name in ("a.jsonl", "b.jsonl")
    for line in (corpus / name).read_text().splitlines()
  ]
  held_out = set(found["validation"])
  assert found["train"] == [text for text in expected if text not in held_out]
  assert found["validation"] == [text for text in expected if text in held_out]
  assert 200 < len(held_out) < 400
  counts = prepared.manifest["splits"]["train"]
  assert counts["documents"] == len(found["train"])
  assert counts["bytes"] == sum(len(text.encode()) for text in found["train"])


def test_windows_are_every_1024th_offset_and_the_end(corpus):
  split = prepare(Files(pattern=str(corpus), validation=0.0), Bytes()).split("train")
  offsets = split.offsets[:]
  assert split.windows.tolist() == [*offsets[[0, 1024, 2048]], offsets[-1]]
  assert offsets[-1] == len(split.tokens) - 1


def test_equal_texts_are_never_on_both_sides(tmp_path):
  (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "%d"}' % (i % 100) for i in range(1000)]))  # noqa: UP031
  found = texts(prepare(Files(pattern=f"{tmp_path}/a.jsonl", validation=0.3), Bytes()))
  assert len(found["train"]) + len(found["validation"]) == 1000
  assert not set(found["train"]) & set(found["validation"])


def test_held_out_files_are_the_validation_split(corpus):
  source = Files(pattern=str(corpus / "a.jsonl"), validation=str(corpus / "b.jsonl"))
  splits = prepare(source, Bytes()).manifest["splits"]
  assert (splits["train"]["documents"], splits["validation"]["documents"]) == (1500, 1500)


def test_the_same_content_is_built_once_wherever_it_lies(corpus, tmp_path, builds):
  first = prepare(Files(pattern=str(corpus)), Bytes())
  corpus.rename(tmp_path / "moved")
  again = prepare(Files(pattern=str(tmp_path / "moved")), Bytes())
  assert len(builds) == 1
  assert first.folder == again.folder
  assert again.manifest == first.manifest


def test_changed_content_settings_and_tokenizers_are_built_anew(corpus, builds):
  prepare(Files(pattern=str(corpus)), Bytes())
  prepare(Files(pattern=str(corpus), validation=0.5), Bytes())
  prepare(Files(pattern=str(corpus), max_bytes=50), Bytes())
  prepare(Files(pattern=str(corpus)), BPE(vocab=300))
  prepare(Files(pattern=str(corpus)), BPE(vocab=301))
  with (corpus / "a.jsonl").open("a") as file:
    file.write('\n{"text": "one more"}')
  prepare(Files(pattern=str(corpus)), Bytes())
  assert len({path.name for path in builds}) == len(builds) == 6


def test_wide_vocabularies_take_four_bytes(corpus):
  narrow = prepare(Files(pattern=str(corpus)), BPE(vocab=2**16))
  wide = prepare(Files(pattern=str(corpus)), BPE(vocab=2**16 + 1))
  dtypes = [p.split("train").tokens[:1].dtype for p in (narrow, wide)]
  assert dtypes == [np.uint16, np.uint32]
  assert texts(narrow) == texts(wide)


def test_bad_input_is_counted_named_and_kept_out(corpus, builds):
  (corpus / "c.jsonl").write_text('{"text": "good"}\nbad\n{"text": 1}\nbad\n')
  (corpus / "d.txt").write_text("")
  prepared = prepare(Files(pattern=str(corpus), validation=0.0), Bytes())
  assert prepared.manifest["problems"] == {
    "not JSON": 2,
    "'text' is not text": 1,
    "empty file": 1,
  }
  assert prepared.manifest["splits"]["train"]["documents"] == 3001
  named = [json.loads(line) for line in (prepared.folder / "problems.jsonl").open()]
  assert [(os.path.basename(p["file"]), p["line"]) for p in named] == [
    ("c.jsonl", 2),
    ("c.jsonl", 3),
    ("c.jsonl", 4),
    ("d.txt", None),
  ]
  again = prepare(Files(pattern=str(corpus), validation=0.0), Bytes())
  assert len(builds) == 1  # What is found in the cache tells as well.
  for each in (prepared, again):
    assert each.kept_out() == (
      "kept out of the data: 2 x not JSON, 1 x 'text' is not text, 1 x empty file; first "
      f"{corpus}/c.jsonl:2: not JSON (Expecting value); all in {prepared.folder}/problems.jsonl"
    )
  with pytest.raises(Refused, match=r"c\.jsonl:2: not JSON"):
    prepare(Files(pattern=str(corpus), validation=0.0, on_error="refuse"), Bytes())


def test_a_share_that_holds_nothing_out_is_refused(tmp_path):
  (tmp_path / "a.txt").write_text("one document")
  with pytest.raises(Refused, match=r"validation=0.01 holds out none of the 1 documents: take a l"):
    prepare(Files(pattern=str(tmp_path / "a.txt")), Bytes())
  assert prepare(Files(pattern=str(tmp_path / "a.txt"), validation=0), Bytes()).kept_out() is None


def test_a_cache_that_cannot_be_written_is_refused_by_its_variable(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "file/cache"))
  with pytest.raises(Refused, match=r"the cache .* cannot be written: .*; set BIGTRAIN_CACHE"):
    cache.root()


def test_a_source_without_any_document_is_refused_with_the_cause(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff")
  with pytest.raises(Refused, match=r"no document to train on; .*a\.txt:1: invalid UTF-8"):
    prepare(Files(pattern=str(tmp_path / "a.txt")), Bytes())


def test_a_folder_that_lost_bytes_is_built_again(corpus, builds):
  prepared = prepare(Files(pattern=str(corpus)), Bytes())
  expected = texts(prepared)
  os.truncate(prepared.folder / "train.tokens", 1000)
  assert texts(prepare(Files(pattern=str(corpus)), Bytes())) == expected
  assert len(builds) == 2


KILLED = """
import os, sys
from bigtrain.data import build, cache, sources, tokenizers
build.Writer.close = lambda self: os._exit(9)
cache.prepare(sources.Files(pattern=sys.argv[1]), tokenizers.Bytes())
"""


def test_a_killed_build_is_never_taken_for_a_cache(corpus, builds):
  killed = subprocess.run([sys.executable, "-c", KILLED, str(corpus)], check=False)
  assert killed.returncode == 9
  left = list((cache.root() / "data").iterdir())
  assert [path.suffix for path in left if path.is_dir()] == [".building"]
  prepared = prepare(Files(pattern=str(corpus)), Bytes())
  assert len(builds) == 1
  assert sum(map(len, texts(prepared).values())) == 3000
  assert [p for p in (cache.root() / "data").iterdir() if p.is_dir()] == [prepared.folder]


def _prepare_together(pattern, barrier, results):
  built, build = [], cache.build
  cache.build = lambda *args: built.append(1) or build(*args)
  barrier.wait()
  prepared = prepare(Files(pattern=pattern), BPE(vocab=400))
  results.put((len(built), str(prepared.folder), prepared.split("train").tokens[:100].tolist()))


def test_two_processes_at_once_build_once(corpus):
  context = multiprocessing.get_context("spawn")
  barrier, results = context.Barrier(2), context.Queue()
  arguments = (str(corpus), barrier, results)
  processes = [context.Process(target=_prepare_together, args=arguments) for _ in range(2)]
  for process in processes:
    process.start()
  found = [results.get(timeout=60) for _ in processes]
  for process in processes:
    process.join()
  assert sorted(built for built, *_ in found) == [0, 1]
  assert found[0][1:] == found[1][1:]


def test_texts_that_other_files_hold_out_are_kept_out_of_training_and_counted(tmp_path):
  line = lambda i: json.dumps({"text": f"document {i}"}) + "\n"
  (tmp_path / "a.jsonl").write_text("".join(map(line, range(20))))
  (tmp_path / "b.jsonl").write_text("".join(map(line, range(15, 25))))
  source = Files(pattern=f"{tmp_path}/a.jsonl", validation=f"{tmp_path}/b.jsonl")
  prepared = prepare(source, Bytes())
  found = texts(prepared)
  assert found["train"] == [f"document {i}" for i in range(15)] and len(found["validation"]) == 10
  assert "5 x also held out; first" in str(prepared.kept_out())
  source.on_error = "refuse"
  with pytest.raises(Refused, match=r"a\.jsonl: also held out .*document 15"):
    prepare(source, Bytes())


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets", "manifest.json"])
def test_a_cache_of_which_one_bit_is_wrong_is_made_again(corpus, builds, name):
  source = Files(pattern=str(corpus), validation=0.1)
  before = texts(made := prepare(source, Bytes()))
  data = bytearray((made.folder / name).read_bytes())
  data[len(data) // 2] ^= 1
  (made.folder / name).write_bytes(data)
  assert texts(prepare(source, Bytes())) == before and len(builds) == 2


def test_a_file_that_is_cut_off_while_it_is_read_is_told_of(corpus):
  tokens = (made := prepare(Files(pattern=str(corpus)), Bytes())).split("train").tokens
  os.truncate(made.folder / "train.tokens", 10)
  with pytest.raises(OSError, match=r"train.tokens was cut off while it was read"):
    tokens[100:200]


@pytest.mark.parametrize("damage", [b"[" * 100_000, b"[1, 2]", b'{"a": \xff}'])
def test_damaged_notes_of_hashes_are_made_again(corpus, builds, damage):
  prepare(Files(pattern=str(corpus)), Bytes())
  (cache.root() / "hashes.json").write_bytes(damage)
  prepare(Files(pattern=str(corpus)), Bytes())
  assert len(builds) == 1
