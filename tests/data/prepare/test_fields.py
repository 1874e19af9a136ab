"""Every setting of a preparation is used: a second value of it changes what comes out, or what the
engine is asked for."""

import copy
import functools
import sys
import types
from typing import Any

import pytest

pytest.importorskip("datatrove")

import datatrove.executor as executors

from bigtrain.config import Refused
from bigtrain.data.prepare.engine import Local, Ray, Slurm, Stage
from bigtrain.data.prepare.near import signing, stages
from bigtrain.data.prepare.quality import C4, FineWeb, Gopher, GopherRepetition, Language
from bigtrain.data.prepare.recipe import NearDuplicates, SharedLines
from bigtrain.data.prepare.run import prepare
from bigtrain.data.prepare.steps import (
  ControlCharacters,
  Repair,
  RepeatedLines,
  Scrub,
  Whitespace,
)
from bigtrain.data.tokenizers import BPE
from tests.data.prepare.corpus import contents, document, jsonl, kept, recipe, report
from tests.data.prepare.test_steps import ENGLISH, GOOD, JUNK
from tests.fields import changed, leaves, second_values

STEPS = (Repair, ControlCharacters, Whitespace, RepeatedLines, Scrub, Gopher, GopherRepetition, C4)
STEPS = (*STEPS, FineWeb, Language)
TEXTS = [
  *JUNK.values(),
  GOOD,
  ENGLISH,
  "cafÃ© &amp; tea ﬁne\x00\n\n\n\nb  c",
  "a@b.org 8.8.8.8 +1 212 555 0142 and so on",
  "A line that is there twice\nx\nA line that is there twice",
  GOOD + "\n- a line that ends ...\n" * 2 + "two words.\nNo end here",
  "\n".join(f"{document(i, 14)} and the of ..." for i in range(12)),
  "This is one. This is the second one. And this is the third of them.",
  "The extraordinarily incomprehensible characterizations of the intercontinental and that " * 8,
  "Das Haus stand am Ende der Straße, und der Garten dahinter war mit Rosen bepflanzt.",
]
# Values that the texts above can tell from the default's.
VALUES = {
  "Gopher.max_words": (60,),
  "Gopher.max_word_length": (4.0,),
  "Gopher.max_ellipses": (1.0,),
  "Gopher.min_stop_words": (7,),
  "GopherRepetition.duplicate_line_chars": (0.01,),
  "C4.min_words_per_line": (4, 30),
  "FineWeb.min_ended_lines": (0.0,),
  "FineWeb.max_lines_per_word": (0.01,),
  "Language.languages": (("de",),),
  "Language.threshold": (0.999,),
}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_field_of_a_step_changes_what_it_makes_of_some_text(step):
  outcomes = lambda step: [step.make()(text) for text in TEXTS] if step.on else TEXTS
  base = outcomes(step())
  dead = []
  for leaf in leaves(step()):
    if leaf.field == "Language.model":
      continue  # No second model is at hand; that the file it names is taken is tested beside it.
    values = VALUES.get(leaf.field) or second_values(getattr(step(), leaf.name), leaf.kind)
    if not any(outcomes(changed(step(), leaf.path, value)) != base for value in list(values)[:4]):
      dead.append(leaf.field)
  assert not dead


def test_every_field_of_near_duplicates_changes_what_is_looked_for(tmp_path):
  def probe(c: NearDuplicates) -> Any:
    shingles = signing(c, tmp_path).get_shingles(GOOD)
    return signing(c, tmp_path).get_signature(shingles), [s.tasks for s in stages(c, tmp_path, 2)]

  base = probe(NearDuplicates())
  for field, value in {"words": 3, "bands": 7, "rows": 4, "seed": 2}.items():
    assert probe(NearDuplicates(**{field: value})) != base, field
  assert probe(NearDuplicates(threshold=0.9)) == base  # It is the next test's.


def test_every_field_of_a_recipe_changes_the_result(tmp_path):
  """By small preparations. How many tasks there are decides the files that hold the result."""
  words = document(0, 60).split()
  near = " ".join([*words[:28], "other", *words[29:]])  # Similar by 0.82.
  texts = [document(i) for i in range(8)] + [document(1), near]
  texts += [f"Begin {i}\nA line that all of these have\n{document(i, 9)}" for i in range(20, 26)]
  jsonl(tmp_path / "in" / "a.jsonl", texts)
  jsonl(tmp_path / "more" / "b.jsonl", ["another one"])
  (tmp_path / "in" / "b.txt").write_text("Title\nChapter\nIt is.\nChapter\nIt was.\n")
  (tmp_path / "in" / "c.jsonl").write_text('{"text": "this", "body": "that"}\n')
  found = NearDuplicates(bands=3, rows=1)
  base = recipe(
    tmp_path / "in", near=found, lines=SharedLines(documents=6), tokenizer=BPE(vocab=270), tasks=1
  )
  runs = iter(range(100))

  @functools.lru_cache
  def outcome(r) -> Any:
    out = tmp_path / f"out{next(runs)}"
    prepare(copy.deepcopy(r), out)
    results = contents(out)
    del results["manifest.json"]  # It has the settings themselves.
    return results, "previous" in report(out)

  values: dict[str, Any] = {
    "inputs": (str(tmp_path / "in"), str(tmp_path / "more")),
    "text_field": "body",
    "split_at": "^Chapter$",
    "max_bytes": 200,
    "near": None,
    "near.threshold": 0.9,
    "lines": None,
    "lines.documents": 7,
    "lines.min_chars": 40,
    "validation": 0.4,
    "test": 0.4,
    "tokenizer": None,
    "tokenizer.vocab": 280,
    "tokenizer.special": ("[X]",),
    "shard_bytes": 100,
    "previous": str(tmp_path / "out0"),
    "tasks": 2,
  }
  tried = set(values) | {"exact"}
  first = outcome(base)
  unseen = {leaf.path for leaf in leaves(base)} - tried
  # What the other tests of this file look at.
  assert {p for p in unseen if p.split(".")[0] not in ("near", "steps", "engine")} <= {"inputs.0"}
  dead = [path for path, value in values.items() if outcome(changed(base, path, value)) == first]
  alone = changed(base, "near", None)
  assert outcome(changed(alone, "exact", "keep")) != outcome(alone)
  assert not dead
  assert len(kept(tmp_path / "out0")) == 8 + 6 + 2


def test_every_field_of_an_engine_is_asked_for(tmp_path, monkeypatch):
  """What datatrove's executors are given, and the job that they would queue."""
  asked: list[dict] = []

  def executor(*_, **settings):
    asked.append(settings)
    (tmp_path / "work" / "stages" / "s" / "completions").mkdir(parents=True, exist_ok=True)
    for rank in range(3):
      (tmp_path / "work" / "stages" / "s" / "completions" / f"{rank}").touch()
    return types.SimpleNamespace(run=lambda: None, job_id="7")

  monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
  for name in ("SlurmPipelineExecutor", "RayPipelineExecutor"):
    monkeypatch.setattr(executors, name, executor)
  seconds = {
    Slurm: {"partition": "gpu", "time": "1:00:00", "workers": 4, "cpus": 2, "memory_gb": 9}
    | {"venv": "/venv", "options": (("account", "x"),)},
    Ray: {"workers": 4, "cpus": 2, "memory_gb": 9.0},
  }

  def probe(engine) -> list[dict]:
    asked.clear()
    for mark in tmp_path.glob("work/stages/s/completions/*"):
      mark.unlink()
    engine.run([Stage("s", [], 3)], tmp_path)
    return [{k: v for k, v in a.items() if k != "depends"} for a in asked]

  for kind, values in seconds.items():
    given = {"partition": "cpu"} if kind is Slurm else {}
    base = probe(kind(**given))
    assert set(values) == {leaf.path for leaf in leaves(kind(**given))}
    for field, value in values.items():
      assert probe(kind(**(given | {field: value}))) != base, f"{kind.__name__}.{field}"
  assert {leaf.path for leaf in leaves(Local())} == {"workers"}  # See test_prepare.py.


def test_ray_tells_where_the_logs_of_failed_tasks_are(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
  nothing = lambda *_, **__: types.SimpleNamespace(run=lambda: None)
  monkeypatch.setattr(executors, "RayPipelineExecutor", nothing)
  with pytest.raises(OSError, match=r"2 of 2 tasks of the stage s failed; their logs are in"):
    Ray().run([Stage("s", [], 2)], tmp_path)


def test_the_model_that_the_language_step_names_is_the_one_it_takes(tmp_path):
  copy_of = tmp_path / "mine.ftz"
  copy_of.write_bytes(Language()._path().read_bytes())
  assert Language(model=str(copy_of)).make()(ENGLISH) == ENGLISH
  copy_of.write_bytes(b"no model")
  with pytest.raises(Exception, match="model"):
    Language(model=str(copy_of)).make()
  copy_of.unlink()
  with pytest.raises(Refused):
    Language(model=str(copy_of)).check()
