"""The preparation as a whole, on a corpus with planted faults."""

import gzip
import hashlib
import json
import re

import pytest

pytest.importorskip("datatrove")

from bigtrain.config import Refused
from bigtrain.data.prepare.engine import Local
from bigtrain.data.prepare.run import _lines, prepare
from bigtrain.data.sources import PreparedText
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE, TokenizerFile
from bigtrain.train import train
from tests import runs
from tests.data.prepare.corpus import (
  document,
  jsonl,
  kept,
  recipe,
  rejected,
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
  """(folder of inputs, prepared folder) with every fault of the issue."""
  root = tmp_path_factory.mktemp("planted")
  inputs = root / "in"
  unique = [document(i) for i in range(40)]
  jsonl(inputs / "a.jsonl", [*unique, unique[3], "  " + unique[4] + "\r\n"])
  jsonl(inputs / "b.jsonl", [unique[3], document(100)])
  (inputs / "bad.txt").write_bytes(b"valid until here \xff\xfe and no further")
  whole = gzip.compress(
    jsonl(root / "c.jsonl", [document(i) for i in range(200, 400)]).read_bytes()
  )
  (inputs / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
  (inputs / "empty.txt").touch()
  (inputs / "picture.png").write_bytes(b"\x89PNG")
  (inputs / "entities.txt").write_text("Fish &amp; chips cost &pound;5, âœ” said the cafÃ©.")
  (inputs / "han.txt").write_text("学而时习之，不亦说乎？有朋自远方来，不亦乐乎？")
  (inputs / "devanagari.md").write_text("क्‍ष और नमस्ते दुनिया, यह एक परीक्षण है।")
  (inputs / "page.html").write_text(
    "<html><head><title>t</title></head><body><nav>Home About</nav><article><h1>A page</h1><p>"
    + "This is the text of the page &mdash; and it is long enough to be found. " * 8
    + "</p></article><footer>Imprint</footer></body></html>"
  )
  (inputs / "long.jsonl").write_text(
    json.dumps({"text": "x" * 5_000_000})
    + "\n"
    + json.dumps({"text": "after the long line"})
    + "\n"
  )
  out = root / "out"
  prepare(recipe(inputs, max_bytes=500_000, tokenizer=BPE(vocab=300)), out)
  return inputs, out, unique


def test_every_exact_duplicate_is_found_and_nothing_else_is(planted):
  _, out, unique = planted
  texts = kept(out)
  assert set(unique) <= set(texts)
  gone = [r for r in rejected(out) if r["step"] == "exact duplicate"]
  assert sorted(r["text"] for r in gone) == sorted([unique[3], unique[3], unique[4]])


def test_faults_are_kept_out_with_their_place_and_the_rest_goes_on(planted):
  _, out, _ = planted
  found = {
    r["id"].split("/")[-1].split("#")[0]: r["reason"] for r in rejected(out) if r["step"] == "read"
  }
  assert found["bad.txt"] == "invalid UTF-8"
  assert found["cut.jsonl.gz"] == "truncated .gz"
  assert found["empty.txt"] == "empty file"
  assert found["long.jsonl"] == "too long"
  assert found["picture.png"].startswith("not .txt")
  assert "after the long line" in kept(out)
  assert document(200) in kept(out)  # Before the damage.


def test_text_is_repaired_and_other_scripts_survive(planted):
  _, out, _ = planted
  texts = kept(out)
  assert "Fish & chips cost £5, ✔ said the café." in texts
  assert "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" in texts
  assert "क्‍ष और नमस्ते दुनिया, यह एक परीक्षण है।" in texts
  [page] = [t for t in texts if "the text of the page — and" in t]
  assert "Imprint" not in page and "Home" not in page


def test_counts_of_report_and_manifest_add_up(planted):
  _, out, _ = planted
  report, manifest = (json.loads((out / f"{n}.json").read_text()) for n in ("report", "manifest"))
  there = kept(out)
  assert sum(s["documents"] for s in manifest["splits"].values()) == len(there) == report["kept"]
  assert sum(s["bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in there)
  assert sum(report["lengths"]["kept"]) == len(there)
  read = report["steps"][0]
  lost = [r for r in rejected(out) if r["step"] != "read"]
  assert read["documents"] == len(there) + len(lost)
  for shard in manifest["shards"]:
    assert (
      hashlib.sha256((out / "shards" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    )
  page = (out / "report.html").read_text()
  assert "exact duplicate" in page and "truncated .gz" in page and "<svg" in page
  assert "http" not in re.sub(r"https?://[^<]*", "", page)  # Nothing is loaded.


def test_another_number_of_tasks_or_workers_keeps_and_splits_the_same(planted, tmp_path):
  inputs, out, _ = planted
  prepare(recipe(inputs, max_bytes=500_000, tasks=3, engine=Local(workers=2)), tmp_path / "out")
  assert kept(tmp_path / "out") == kept(out)


def test_nothing_kept_is_still_a_report(tmp_path, capsys):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "empty.txt").touch()
  with pytest.raises(Refused, match="no document is left"):
    prepare(recipe(tmp_path / "in"), tmp_path / "out")
  assert (tmp_path / "out" / "report.html").exists()
  assert "preparing 1 file in " in capsys.readouterr().err


def test_each_stage_is_told_once_where_there_is_no_bar(capsys):
  tell = _lines(9)
  for stage, n in (("clean", 0), ("clean", 2), ("exact", 4), ("exact", 5), ("", 9)):
    tell(stage, n)
  assert capsys.readouterr().err.splitlines() == [
    "bigtrain: clean: 0 of 9 tasks are done",
    "bigtrain: exact: 4 of 9 tasks are done",
  ]


@pytest.mark.slow
def test_a_line_of_100_mb_is_rejected_in_little_memory(tmp_path):
  with (tmp_path / "a.jsonl").open("w") as file:
    file.write('{"text": "' + "x" * 100_000_000 + '"}\n{"text": "the next one"}\n')
  prepare(recipe(tmp_path / "a.jsonl", max_bytes=10_000_000), tmp_path / "out")
  assert list(kept(tmp_path / "out")) == ["the next one"]


def test_a_model_trains_on_what_was_prepared(planted, tmp_path, monkeypatch):
  _, out, _ = planted
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("RUNS_TEXT", "unused")
  e = runs.base()
  tokenizer = TokenizerFile(path=str(out / "tokenizer.json"))
  e.data = TextData(source=PreparedText(path=str(out)), tokenizer=tokenizer, seq=64)
  e.model.vocab, e.steps, e.optimizer.schedule.warmup = 384, 2, 0
  train(e, tmp_path / "run", quiet=True)
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2]
  splits, texts = e.data.make(0).manifest["splits"], kept(out)
  for name in ("train", "validation"):
    assert splits[name]["documents"] == list(texts.values()).count(name) > 0
  with pytest.raises(Refused, match="holds no finished preparation"):
    PreparedText(path=str(tmp_path)).check()
