"""The preparation as a whole, on a corpus with planted faults."""

import gzip
import hashlib
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("datatrove")

from bigtrain.config import Refused
from bigtrain.data.prepare.engine import Local
from bigtrain.data.prepare.files import read_lines
from bigtrain.data.prepare.pack import SPLITS, read_shard
from bigtrain.data.prepare.recipe import NearDuplicates, Prepare
from bigtrain.data.prepare.run import prepare
from bigtrain.data.prepare.steps import ControlCharacters, Repair, RepeatedLines, Whitespace

WORDS = [f"w{i:03}" for i in range(900)]


def document(seed: int, words: int = 60) -> str:
  rng = random.Random(seed)
  return " ".join(rng.choice(WORDS) for _ in range(words))


def shingles(text: str, n: int = 5) -> set:
  """Of text as MinHash sees it, where numbers are all alike: words here are letters."""
  words = text.split()
  return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def letters(text: str) -> str:
  """Digits as letters: MinHash takes all numbers for one."""
  return re.sub(r"\d", lambda d: "abcdefghij"[int(d[0])], text)


def jsonl(path: pathlib.Path, texts) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
  return path


def recipe(folder, **fields) -> Prepare:
  defaults = {
    "steps": (Repair(), ControlCharacters(), Whitespace()),
    "tasks": 2,
    "engine": Local(workers=1),
  }
  return Prepare(inputs=(str(folder),), validation=0.2, test=0.1, **(defaults | fields))


def kept(out: pathlib.Path) -> dict[str, str]:
  """{text: split} of all that was kept."""
  found = {}
  for split in SPLITS:
    for path in sorted((out / "shards").glob(f"{split}-*")):
      for record in read_shard(path):
        assert record["text"] not in found, "a text was kept twice"
        found[record["text"]] = split
  return found


def rejected(out: pathlib.Path) -> list[dict]:
  return [r for path in sorted((out / "rejected").iterdir()) for r in read_lines(path)]


def contents(out: pathlib.Path) -> dict[str, str]:
  """The digests of all results."""
  paths = [p for f in ("shards", "rejected", "assignment") for p in sorted((out / f).iterdir())]
  paths += [out / "manifest.json", out / "tokenizer.json"]
  return {
    str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.exists()
  }


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
  """(folder of inputs, prepared folder) with every fault of the issue."""
  root = tmp_path_factory.mktemp("planted")
  inputs = root / "in"
  unique = [letters(document(i)) for i in range(40)]
  jsonl(inputs / "a.jsonl", [*unique, unique[3], "  " + unique[4] + "\r\n"])
  jsonl(inputs / "b.jsonl", [unique[3], letters(document(100))])
  (inputs / "bad.txt").write_bytes(b"valid until here \xff\xfe and no further")
  whole = gzip.compress(
    jsonl(root / "c.jsonl", [letters(document(i)) for i in range(200, 400)]).read_bytes()
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
  prepare(recipe(inputs, max_bytes=500_000), out)
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
  assert letters(document(200)) in kept(out)  # Before the damage.


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


def varied(text: str, share: float, rng: random.Random) -> str:
  """The text with some of its words replaced by new ones, at a random place in one run."""
  words = text.split()
  n = max(1, round(share * len(words)))
  at = rng.randrange(len(words) - n)
  return " ".join(
    [*words[:at], *(letters(f"x{rng.randrange(10**6)}") for _ in range(n)), *words[at + n :]]
  )


def test_near_duplicates_are_found_at_the_recall_of_the_bands(tmp_path):
  rng = random.Random(0)
  near = NearDuplicates(threshold=0.5, bands=7, rows=8)
  bases = [letters(document(i, 200)) for i in range(150)]
  pairs = [(b, varied(b, rng.choice([0.02, 0.06, 0.1, 0.16]), rng)) for b in bases]
  far = [varied(b, 0.5, rng) for b in bases[:50]]
  jsonl(tmp_path / "in" / "a.jsonl", bases)
  jsonl(tmp_path / "in" / "b.jsonl", [v for _, v in pairs])
  jsonl(tmp_path / "in" / "c.jsonl", far)
  prepare(recipe(tmp_path / "in", near=near, tasks=3), tmp_path / "out")
  texts = set(kept(tmp_path / "out"))
  jaccard = lambda a, b: len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
  similarities = [jaccard(a, b) for a, b in pairs]
  expected = sum(near.recall(s) for s in similarities if s >= 0.5)
  found = sum((a in texts) + (b in texts) == 1 for a, b in pairs)
  spread = sum(near.recall(s) * (1 - near.recall(s)) for s in similarities) ** 0.5
  assert abs(found - expected) <= 3 * spread + 1
  assert found < len(pairs), "nothing was missed: the pairs are too easy to test the bands"
  assert set(far) <= texts, "a document below the threshold was lost"
  for record in rejected(tmp_path / "out"):
    assert record["reason"] == "near duplicate"
    assert max(jaccard(record["text"], other) for other in texts) >= 0.5


def test_pairs_that_meet_below_the_threshold_stay_both(tmp_path):
  rng = random.Random(1)
  near = NearDuplicates(threshold=0.9, bands=30, rows=1)  # Almost any pair meets.
  bases = [letters(document(i, 100)) for i in range(30)]
  jsonl(tmp_path / "in" / "a.jsonl", bases + [varied(b, 0.2, rng) for b in bases])
  prepare(recipe(tmp_path / "in", near=near), tmp_path / "out")
  assert len(kept(tmp_path / "out")) == 60
  report = json.loads((tmp_path / "out" / "report.json").read_text())
  assert report["near"]["pairs"] == report["near"]["below_threshold"] > 30


def test_added_documents_change_no_split_but_of_reported_clusters(tmp_path):
  rng = random.Random(2)
  old = [letters(document(i, 100)) for i in range(300)]
  jsonl(tmp_path / "in" / "m.jsonl", old)
  prepare(recipe(tmp_path / "in"), tmp_path / "one")
  before = kept(tmp_path / "one")
  assert {s: list(before.values()).count(s) > 15 for s in SPLITS} == dict.fromkeys(SPLITS, True)
  new = [letters(document(1000 + i, 100)) for i in range(200)] + [
    varied(t, 0.02, rng) for t in old[:60]
  ]
  jsonl(tmp_path / "in" / "a.jsonl", new)  # Sorted before the old file: all tasks shift.
  prepare(recipe(tmp_path / "in", previous=str(tmp_path / "one"), tasks=3), tmp_path / "two")
  after = kept(tmp_path / "two")
  told = json.loads((tmp_path / "two" / "report.json").read_text())["previous"]
  assert (told["both"], told["gone"], told["added"]) == (300, 0, 260)
  moved = {
    hashlib.blake2b(t.encode(), digest_size=16).hexdigest()[:16]
    for t in old
    if t in after and after[t] != before[t]
  }
  reported = {c["digest"] for c in told["changed"]}
  assert moved <= reported
  assert 0 < told["cluster_changed"] <= 60 and len(reported) <= told["cluster_changed"]
  assert told["split_changed"] == len(reported)


def test_another_number_of_tasks_or_workers_keeps_and_splits_the_same(planted, tmp_path):
  inputs, out, _ = planted
  prepare(recipe(inputs, max_bytes=500_000, tasks=5, engine=Local(workers=2)), tmp_path / "out")
  assert kept(tmp_path / "out") == kept(out)


COMMAND = """
from bigtrain.data.prepare.quality import GopherRepetition
from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.steps import ControlCharacters, Repair, Step, Whitespace
from bigtrain.data.tokenizers import BPE
from bigtrain.config import config
import time

@config
class Slow(Step):
  '''Takes its time, and is of the experiment file.'''
  seconds: float = 0.0
  def make(self):
    def apply(text):
      time.sleep(self.seconds)
      return text
    return apply

def base() -> Prepare:
  return Prepare(
    inputs=({inputs!r},), steps=(Repair(), Whitespace(), Slow(seconds={seconds})), tasks=4,
    tokenizer=BPE(vocab=300), validation=0.2,
  )
"""


def command(file: pathlib.Path, out: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "bigtrain.cli", "data", "prepare", str(file), "--out", str(out)],
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def test_killed_and_started_again_it_repeats_nothing_and_gives_the_same_bytes(tmp_path):
  for i in range(4):
    jsonl(tmp_path / "in" / f"{i}.jsonl", [letters(document(100 * i + j)) for j in range(40)])
  file = tmp_path / "recipe.py"
  file.write_text(COMMAND.format(inputs=str(tmp_path / "in"), seconds=0.04))
  out = tmp_path / "out"
  first = command(file, out)
  marks = out / "work" / "stages" / "clean" / "completions"
  deadline = time.time() + 40
  while time.time() < deadline and not (marks.is_dir() and any(marks.iterdir())):
    time.sleep(0.05)
  first.send_signal(signal.SIGKILL)
  first.wait()
  finished = {p.name: p.stat().st_mtime_ns for p in marks.iterdir()}
  assert 1 <= len(finished) < 4
  second = command(file, out)
  _, said = second.communicate(timeout=60)
  assert second.returncode == 0, said
  assert "tasks are done" in said and "report.html" in said
  assert {n: (marks / n).stat().st_mtime_ns for n in finished} == finished
  assert not list(out.rglob("*.part"))
  third = command(file, tmp_path / "other")
  assert third.communicate(timeout=60) and third.returncode == 0
  assert contents(out) == contents(tmp_path / "other")


def test_a_changed_recipe_or_input_in_the_same_folder_is_refused(tmp_path):
  path = jsonl(tmp_path / "in" / "a.jsonl", ["one two three", "four five"])
  prepare(recipe(tmp_path / "in"), tmp_path / "out")
  with pytest.raises(Refused, match=r"begun with another config: validation: 0.2 -> 0.3"):
    other = recipe(tmp_path / "in")
    other.validation = 0.3
    prepare(other, tmp_path / "out")
  again = prepare(recipe(tmp_path / "in", engine=Local(workers=2)), tmp_path / "out")
  assert again is not None
  jsonl(path, ["one two three"])
  with pytest.raises(Refused, match=r"the input of .* has changed since: .*a.jsonl"):
    prepare(recipe(tmp_path / "in"), tmp_path / "out")
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "thesis.txt").touch()
  with pytest.raises(Refused, match=r"holds other files, such as thesis.txt"):
    prepare(recipe(tmp_path / "in"), tmp_path / "own")


def test_nothing_kept_is_still_a_report(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "empty.txt").touch()
  manifest = prepare(recipe(tmp_path / "in"), tmp_path / "out")
  assert manifest is not None and manifest["splits"]["train"]["documents"] == 0


@pytest.mark.slow
def test_a_line_of_100_mb_is_rejected_in_little_memory(tmp_path):
  with (tmp_path / "a.jsonl").open("w") as file:
    file.write('{"text": "' + "x" * 100_000_000 + '"}\n{"text": "the next one"}\n')
  prepare(recipe(tmp_path / "a.jsonl", max_bytes=10_000_000), tmp_path / "out")
  assert list(kept(tmp_path / "out")) == ["the next one"]


def test_repeated_lines_of_a_document_stay_once():
  line = "Subscribe to our newsletter today"
  apply = RepeatedLines().make()
  assert apply(f"{line}\nA.\n{line}\nA.\n") == f"{line}\nA.\nA."


def test_a_model_trains_on_what_was_prepared(planted, tmp_path, monkeypatch):
  from bigtrain.data.sources import PreparedText
  from bigtrain.data.text import TextData
  from bigtrain.train import train
  from tests import runs

  _, out, _ = planted
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("RUNS_TEXT", "unused")
  e = runs.base()
  e.data, e.steps = TextData(source=PreparedText(path=str(out)), seq=64), 2
  e.optimizer.schedule.warmup = 0
  train(e, tmp_path / "run", quiet=True)
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2]
  splits = e.data.make(0).manifest["splits"]
  texts = kept(out)
  for name in ("train", "validation"):
    assert splits[name]["documents"] == list(texts.values()).count(name)
  with pytest.raises(Refused, match="holds no finished preparation"):
    PreparedText(path=str(tmp_path)).check()
