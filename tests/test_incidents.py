"""Planted faults: what is found of each, and kept."""

import numpy as np
import pytest

from bigtrain import evidence, examine
from bigtrain.data.text import TextData
from bigtrain.exit_codes import Exit
from bigtrain.faults import Faults
from tests import faulty, runs
from tests.faulty import BATCH, Plant, Powers, kept, losses, plant_nan, trained

BAD = 10 * BATCH + 3  # An example of step 11, its fourth row.


def test_nan_in_the_data_is_found_and_its_row_kept(tmp_path):
  path = trained(faulty.nan_in_step_11(), tmp_path / "run")
  about, folder = kept(path)
  assert (about["kind"], about["cause"], about["first_bad"]) == (
    "nonfinite",
    "data",
    "batch/inputs",
  )
  assert about["examples"] == [80, 88] and about["checkpoint"] == 8 and about["policy"] == "skip"
  assert about["loss"] is None and about["rows"][0] == 3 and len(about["rows"]) == BATCH
  assert about["layers"]["batch/labels"] == 2 and about["layers"]["batch/inputs"] is None
  batch = np.load(folder / "batch.npz")
  assert batch["rows"].tolist() == about["rows"] and np.isnan(batch["inputs"][0, 1])
  clean = faulty.Points().make(0).batch(80, BATCH)
  np.testing.assert_array_equal(batch["labels"], clean["labels"][about["rows"]])
  (event,) = runs.events(path, "incident")
  assert event["path"] == "incidents/00000011" and event["cause"] == "data"
  rows = runs.read(path, "metrics.jsonl")
  assert [row["step"] for row in rows if row["skipped"]] == [11]


def test_a_batch_that_one_process_cannot_read_again_leaves_none_alone(tmp_path):
  each = [runs.start(tmp_path, file="tests/unread.py", **own) for own in runs.joined(2)]
  ended = [runs.finish(process) for process in each]
  assert [code for code, _ in ended] == [Exit.DONE] * 2, ended
  (event,) = runs.events(tmp_path, "incident")
  assert event["step"] == 11 and "(process 1): a planted error" in event["note"]


@pytest.mark.usefixtures("prepared")
def test_a_token_that_there_is_none_of_is_found_and_its_text_kept(tmp_path, monkeypatch):
  make, clean = TextData.make, runs.base().data.make(0).batch(80, BATCH)["tokens"]

  def spoilt(self, seed):
    data = make(self, seed)
    whole = data.batch

    def batch(example, size, rows=None):
      wanted = (example + np.arange(size))[rows or slice(None)]
      found = whole(example, size, rows)
      tokens = found["tokens"].copy()
      tokens[wanted == BAD, 2] = 70_000
      return found | {"tokens": tokens}

    data.batch = batch
    return data

  monkeypatch.setattr(TextData, "make", spoilt)
  e = runs.base()
  e.steps = 12
  about, folder = kept(trained(e, tmp_path / "run"))
  assert (about["cause"], about["first_bad"]) == ("data", "batch/tokens")
  assert about["loss"] is None and about["gradient_norm"] > 0 and about["rows"][0] == 3
  first = (folder / "batch.txt").read_text().split("\n---")[0]
  assert first.startswith("--- row 3, document 1, ids that stand for nothing: [70000]\n")
  assert bytes([clean[3, 1], clean[3, 3]]).decode() in first


def planted(kind):
  """An experiment and parts with a fault in step 11; the cause, and the first bad tensor."""
  e, parts = faulty.base(), []
  e.data.at, e.steps, e.faults.examine = (BAD,), 12, 1
  match kind:
    case "huge input":
      e.data.how, e.data.to = "set", -1e30
      return e, parts, "data", "batch/inputs"
    case "label":
      e.data.how = "label"
      return e, parts, "data", "batch/labels"
    case "spike":
      e.data.how, e.data.to = "scale", -60.0
      e.faults = Faults(spike=12.0, window=8)
      return e, parts, "data", "batch/inputs"
    case "parameter":
      e.data.at = ()
      return e, [Plant(10, plant_nan)], "optimizer", "parameter/layers.2.weight"
    case "once":
      e.data.how = "once"
      return e, parts, "hardware", None
    case "half":
      e.model, e.optimizer.lr = Powers(), 0.01
      e.data.how, e.data.to = "scale", 60.0
      return e, parts, "precision", "output/up_IF"
  raise KeyError(kind)


@pytest.mark.parametrize("kind", ["huge input", "label", "spike", "parameter", "once", "half"])
def test_the_cause_of_a_planted_fault_is_told(tmp_path, kind):
  e, parts, cause, first_bad = planted(kind)
  about, _ = kept(trained(e, tmp_path / "run", parts=parts))
  assert (about["cause"], about["first_bad"]) == (cause, first_bad), about
  assert about["kind"] == ("spike" if kind == "spike" else "nonfinite") and about["note"] == ""


def test_an_examination_that_fails_ends_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(examine, "Check", lambda *_: 1 / 0)
  monkeypatch.setattr(evidence, "keep_batch", lambda *_: 1 / 0)
  path = trained(faulty.nan_in_step_11(), tmp_path / "run")
  (event,) = runs.events(path, "incident")
  assert "the examination failed: ZeroDivisionError" in event["note"]
  assert "its batch could not be kept: ZeroDivisionError" in event["note"]
  assert event["cause"] == "unknown" and losses(path)[-1] is not None
  assert kept(path)[0]["note"] == event["note"]


@pytest.mark.parametrize(
  ("seen", "cause"),
  [
    ({"devices": "device 3"}, "hardware"),
    ({"inputs": "batch/x", "state": "parameter/w"}, "data"),
    ({"state": "parameter/w"}, "optimizer"),
    ({"bad": {"again": False}, "exact": True}, "hardware"),
    ({"bad": {"again": False}, "far": True}, "hardware"),
    ({"bad": {"again": False}}, "unknown"),
    ({"bad": {"again": True, "other batch": False, "float32": False}}, "precision"),
    ({"bad": {"again": True, "other batch": False, "float32": True}}, "data"),
    ({"bad": {"again": True, "other batch": True}}, "optimizer"),
    ({"bad": {"again": True}}, "unknown"),
  ],
)
def test_the_cause_follows_from_the_evidence(seen, cause):
  plain = {"bad": {"again": True}, "far": False, "exact": False}
  assert examine.Evidence(**{**plain, **seen}).cause() == cause
