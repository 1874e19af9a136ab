"""What cannot be prepared is refused in one message that says what to do."""

import errno
import importlib.util
import json
import os
import shutil

import pytest

pytest.importorskip("datatrove")

from bigtrain import cli
from bigtrain.config import Refused
from bigtrain.data import cache
from bigtrain.data.prepare import run
from bigtrain.data.prepare.engine import Local, Ray
from bigtrain.data.prepare.quality import Gopher
from bigtrain.data.prepare.recipe import NearDuplicates, Prepare, SharedLines
from bigtrain.data.prepare.run import prepare
from bigtrain.data.prepare.steps import RepeatedLines, Whitespace
from bigtrain.data.sources import Files
from bigtrain.data.tokenizers import BPE, Bytes
from bigtrain.exit_codes import Exit
from tests.data.prepare.corpus import contents, jsonl, prepared, recipe


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"inputs": ()}, "inputs is empty: name folders"),
    ({"inputs": ("{in}/b.jsonl",)}, r"no files match .*: .*in/ has no b.jsonl.*'a.jsonl'"),
    ({"inputs": ("{in}/none",)}, r"no files match .*/none"),
    ({"inputs": ("{in}/a.png",)}, r"a.png is not .txt, .md, .html, .jsonl, .warc"),
    ({"tasks": 0}, "tasks is 0: at least 1"),
    ({"validation": 0.6, "test": 0.5}, "validation=0.6 and test=0.5: at least 0 each, below 1"),
    ({"split_at": "("}, "split_at is '\\(', no regular expression"),
    ({"exact": "keep"}, "exact='keep' with near duplicates removed makes no sense"),
    ({"previous": "{in}"}, "is no finished preparation"),
    ({"near": NearDuplicates(bands=0)}, "near.bands is 0: at least 1"),
    ({"near": NearDuplicates(threshold=1.5)}, "near.threshold is 1.5: above 0 and at most 1"),
    ({"lines": SharedLines(documents=1)}, "lines.documents is 1: at least 2"),
    ({"steps": (Whitespace(blank_lines=-1),)}, "blank_lines is -1"),
    ({"steps": (RepeatedLines(min_chars=0),)}, "min_chars is 0"),
    ({"engine": Local(workers=-1)}, "engine.workers is -1"),
  ],
)
def test_impossible_settings_are_refused_before_any_work(fields, message, tmp_path):
  jsonl(tmp_path / "in" / "a.jsonl", ["one two three"])
  (tmp_path / "in" / "a.png").touch()
  r = recipe(tmp_path / "in")
  place = lambda v: v.replace("{in}", str(tmp_path / "in")) if isinstance(v, str) else v
  for name, value in fields.items():
    setattr(r, name, tuple(map(place, value)) if isinstance(value, tuple) else place(value))
  with pytest.raises(Refused, match=message):
    prepare(r, tmp_path / "out")
  assert not (tmp_path / "out" / "work").exists()


def test_a_changed_recipe_or_input_in_the_same_folder_is_refused(tmp_path):
  jsonl(tmp_path / "in" / "a.jsonl", ["one two three", "four five"])
  out = tmp_path / "out"
  prepare(recipe(tmp_path / "in"), out)
  before = contents(out)
  with pytest.raises(Refused, match=r"begun with another config: validation: 0.2 -> 0.3"):
    prepare(recipe(tmp_path / "in", validation=0.3), out)
  assert prepare(recipe(tmp_path / "in", engine=Local(workers=2)), out) is not None
  jsonl(tmp_path / "in" / "a.jsonl", ["one two three"])
  with pytest.raises(Refused, match=r"the input of .* has changed since: .*a.jsonl; take another"):
    prepare(recipe(tmp_path / "in"), out)
  shutil.rmtree(out / "work")
  assert prepare(recipe(tmp_path / "in"), out) is not None  # Finished is finished.
  with pytest.raises(Refused, match="begun with another config"):
    prepare(recipe(tmp_path / "in", validation=0.3), out)
  assert contents(out) == before


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
  r = recipe(jsonl(tmp_path / "in" / "a.jsonl", ["one two three"]))
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "thesis.txt").touch()
  with pytest.raises(Refused, match=r"holds other files, such as thesis.txt: take another --out"):
    prepare(r, tmp_path / "own")
  with pytest.raises(Refused, match=r"thesis.txt/out cannot be written: Not a directory; take"):
    prepare(r, tmp_path / "own" / "thesis.txt" / "out")


def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path, monkeypatch):
  r = recipe(jsonl(tmp_path / "in" / "a.jsonl", ["one two three"]))

  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(run, "finish", lambda *_: full(0))
  with pytest.raises(OSError, match=r"the disk of .*out is full; make room, and the same command"):
    prepare(r, tmp_path / "out")
  monkeypatch.undo()
  assert prepare(r, tmp_path / "out") is not None


def test_packages_that_are_missing_are_named_with_the_command_that_installs_them(
  tmp_path, monkeypatch
):
  r = recipe(jsonl(tmp_path / "in" / "a.jsonl", ["one two three"]))
  there = importlib.util.find_spec
  gone = ("ftfy", "warcio")
  monkeypatch.setattr(run, "find_spec", lambda name: None if name in gone else there(name))
  with pytest.raises(Refused) as raised:
    prepare(r, tmp_path / "out")
  assert str(raised.value).startswith(
    "preparing text needs ftfy, warcio: in a checkout uv run --extra data bigtrain"
  )
  if there("ray") is None:
    monkeypatch.undo()
    with pytest.raises(Refused, match=r"engine=Ray needs another package: pip install ray"):
      prepare(recipe(tmp_path / "in", engine=Ray()), tmp_path / "ray")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["{file}", "--validaton", "0.2"], "there is no flag --validaton; did you mean --validation?"),
    (["{file}", "--tasks", "many"], "--tasks must be int, not 'many'"),
    (["{file}:bse"], "has no function 'bse'; did you mean 'base'?"),
    (["{file}:wrong"], "Prepare has no field 'input'; did you mean 'inputs'?"),
    (["{file}:none"], "Prepare also needs 'inputs'"),
    (["{file}:other"], "returned Repair, not a Prepare"),
    (["nothing.py"], "there is no experiment file nothing.py"),
    ([], "takes CONFIG.py[:function] first: bigtrain data prepare experiments/data/austen.py"),
  ],
)
def test_mistakes_on_the_command_line_are_answered_in_one_line(
  arguments, message, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "r.py").write_text(
    "from bigtrain.data.prepare.recipe import Prepare\n"
    "from bigtrain.data.prepare.steps import Repair\n"
    "def base() -> Prepare:\n  return Prepare(inputs=('in',))\n"
    "def wrong() -> Prepare:\n  return Prepare(input=('in',))\n"
    "def none() -> Prepare:\n  return Prepare()\n"
    "def other() -> Prepare:\n  return Repair()\n"
  )
  given = [a.replace("{file}", "r.py") for a in arguments]
  assert cli.main(["data", "prepare", *given]) == Exit.REFUSED
  said = capsys.readouterr().err
  assert message in said and said.startswith("bigtrain: ") and said.count("\n") == 1


def test_training_files_that_are_also_held_out_are_refused(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  for name in ("train", "val"):
    jsonl(tmp_path / name / "a.jsonl", [f"{name} one two"])
  (tmp_path / "val" / "b.txt").touch()
  (tmp_path / "train" / "b.txt").touch()  # That both have an empty file is no overlap.
  source = Files(pattern=str(tmp_path / "train"), validation=str(tmp_path / "val"))
  assert cache.prepare(source, Bytes()).manifest["splits"]["train"]["documents"] == 1
  shutil.copy(tmp_path / "train" / "a.jsonl", tmp_path / "val" / "copy.jsonl")
  with pytest.raises(Refused, match=r"copy.jsonl is held out, but holds what .*train/a.jsonl does"):
    cache.prepare(source, Bytes())


def test_a_prepared_folder_that_lost_a_shard_is_refused(tmp_path):
  from bigtrain.data.sources import PreparedText

  out = prepared(tmp_path, ["one two three", "four five six"])
  name = json.loads((out / "manifest.json").read_text())["shards"][0]["file"]
  (out / "shards" / name).unlink()
  with pytest.raises(Refused, match=f"has lost its shard {name}: prepare it again"):
    PreparedText(path=str(out)).check()
  with pytest.raises(Refused, match=r"is not there: bigtrain data prepare CONFIG.py --out"):
    PreparedText(path=str(tmp_path / "nowhere")).check()
  assert Prepare(inputs=("x",)).near is not None


def test_a_prepared_folder_that_is_damaged_is_refused(tmp_path):
  from bigtrain.data.sources import PreparedText

  out = prepared(tmp_path, ["one two three", "four five six"])
  source, manifest = PreparedText(path=str(out)), (out / "manifest.json").read_text()
  for text in ('{"shards": 3}', "[" * 100_000, manifest[:-30], json.dumps({"shards": [{}]})):
    (out / "manifest.json").write_text(text)
    with pytest.raises(Refused, match=r"manifest.json is damaged: prepare it again"):
      source.check()
  (out / "manifest.json").write_text(
    manifest.replace(json.loads(manifest)["shards"][0]["file"], "x" * 300)
  )
  with pytest.raises(Refused, match="has lost its shard"):
    source.check()
  (out / "manifest.json").write_text(manifest)
  shard = out / "shards" / json.loads(manifest)["shards"][0]["file"]
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  with pytest.raises(Refused, match=r"array_record is not what was prepared, it is damaged"):
    list(source.documents(lambda n: None))


def test_a_preparation_of_which_nothing_is_left_is_refused_by_the_step_that_rejected_most(tmp_path):
  jsonl(tmp_path / "in" / "a.jsonl", ["one two three", "four five", ""])
  r = recipe(tmp_path / "in", steps=(Gopher(),), tokenizer=BPE(vocab=300))
  for _ in range(2):  # Also where all is done already.
    with pytest.raises(
      Refused, match=r"no document is left: the step Gopher.*2 x short doc.*report"
    ):
      prepare(r, tmp_path / "out")
  assert not (tmp_path / "out" / "tokenizer.json").exists()
