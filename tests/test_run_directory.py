"""The run directory: rows that are unique and whole, and what is refused."""

import contextlib
import errno
import json
import os

import pytest

from bigtrain import lines, load
from bigtrain.config import Refused
from bigtrain.run_directory import RunDirectory
from tests import toys


def begin(path, *, allow_changes=False, **fields) -> RunDirectory:
  directory = RunDirectory(path)
  directory.begin(toys.experiment(**fields), None, allow_changes=allow_changes)
  return directory


def test_a_changed_config_is_refused_with_every_difference(tmp_path):
  begin(tmp_path).row(1, "train", {"loss": 1.0})
  with pytest.raises(Refused) as refused:
    begin(tmp_path, steps=7, model=toys.Model(dim=32))
  message = str(refused.value)
  assert "steps: 100 -> 7" in message and "model.dim: 64 -> 32" in message
  assert "allow_changes=True" in message and "with run_dir" in message and "batch" not in message
  begin(tmp_path, steps=7, allow_changes=True)
  begin(tmp_path, steps=7)


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_changed(tmp_path):
  begin(tmp_path)
  (tmp_path / "checkpoints" / "22").mkdir(parents=True)
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(Refused, match="is at step 22 already, and this is a run of 13; ask for more"):
    begin(tmp_path, steps=13, allow_changes=True)
  assert (tmp_path / "config.json").read_text() == before
  begin(tmp_path, steps=22, allow_changes=True)


def test_a_run_that_never_trained_takes_any_config(tmp_path):
  begin(tmp_path)
  begin(tmp_path, steps=7)
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 7


def test_a_second_start_of_a_run_that_trains_is_refused(tmp_path):
  first = begin(tmp_path)
  with pytest.raises(Refused, match="another process trains in"):
    begin(tmp_path)
  first.close()
  begin(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "thesis.pdf"])
def test_a_directory_without_its_config_is_refused(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(Refused, match=f"no config.json but {name}"):
    begin(tmp_path)


def test_a_process_that_begins_while_the_first_one_does_is_not_refused(tmp_path, monkeypatch):
  other = RunDirectory(tmp_path, writes=False)
  glob = type(other.path).glob

  def late(path, pattern):
    monkeypatch.undo()
    begin(tmp_path)
    return glob(path, pattern)

  monkeypatch.setattr(type(other.path), "glob", late)
  other.begin(toys.experiment(), None, allow_changes=False)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  with pytest.raises(Refused, match=r"cannot write .*run_dir"):
    begin(tmp_path / "file" / "run")

  begin(tmp_path / "ran").row(1, "train", {})

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("bigtrain.load.write", full)
  with pytest.raises(Refused, match="No space left on device"):
    begin(tmp_path / "run")
  # A run that goes on may find room when it is started again, which a refusal would forbid.
  with pytest.raises(OSError, match="No space left on device"):
    begin(tmp_path / "ran")


def test_a_start_that_was_killed_leaves_nothing_in_the_way(tmp_path):
  for name in ("experiment.py", "config.json.unfinished", "experiment.py.unfinished"):
    (tmp_path / name).touch()
  begin(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("torn", ['{"step": 3, "ki', "{"])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, name, torn):
  whole = '{"step": 2, "kind": "train", "event": "x"}\n'
  (tmp_path / name).write_text(whole + torn)
  load.write(toys.experiment(), tmp_path)
  directory = begin(tmp_path)
  assert len(directory.rows("train")) == (name == "metrics.jsonl")
  directory.row(3, "train", {}) if name == "metrics.jsonl" else directory.event("x")
  directory.close()
  text = (tmp_path / name).read_text()
  assert text.startswith(whole) and len(text.splitlines()) == 2 and text.endswith("\n")
  assert [json.loads(line) for line in text.splitlines()]


def test_a_second_writer_takes_no_line_from_the_first(tmp_path):
  """As the watchdog, that sees a line which the run is just writing."""
  directory = begin(tmp_path)
  directory.event("first")
  file = directory._files["events.jsonl"]
  file.write('{"time": 1, "ev')
  file.flush()
  lines.add_event(tmp_path, "straggler", process=1)
  file.write("\n")
  directory.event("save", step=3)
  assert [e["event"] for e in directory.events()] == ["first", "straggler", "save"]


def test_what_a_start_writes_is_on_the_disk(tmp_path, monkeypatch):
  synced, fsync = [], os.fsync
  note = lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number)
  monkeypatch.setattr(os, "fsync", note)
  begin(tmp_path)
  names = ("config.json", "environment.json")
  assert {f"{tmp_path}/{name}.unfinished" for name in names} <= set(synced)


def test_rows_after_the_restored_step_are_dropped(tmp_path):
  directory = RunDirectory(tmp_path)
  for step in range(1, 6):
    directory.row(step, "train", {"loss": 1 / step})
  directory.row(5, "eval", {})
  directory.close()
  directory = RunDirectory(tmp_path)
  directory.drop_rows_after(3)
  directory.row(4, "train", {"loss": 0.25})
  assert [row["step"] for row in directory.rows("train")] == [1, 2, 3, 4]
  assert [row["loss"] for row in directory.rows("train")] == [1 / 1, 1 / 2, 1 / 3, 1 / 4]
  assert not directory.rows("eval")


def test_a_run_that_goes_back_while_it_is_open_writes_on_behind_what_is_left(tmp_path):
  with contextlib.closing(RunDirectory(tmp_path)) as directory:
    for step in (1, 2, 3):
      directory.row(step, "train", {})
    directory.drop_rows_after(1)
    directory.row(2, "train", {"loss": 7.0})
    assert [row.get("loss") for row in directory.rows("train")] == [None, 7.0]


def test_data_that_another_course_of_the_run_left_out_are_forgotten(tmp_path):
  directory = RunDirectory(tmp_path)
  directory.skip(5, 80)
  directory.skip(9, 120)
  assert [directory.skipped_to(step) for step in (4, 5, 9)] == [None, 80, 120]
  directory.skip(5, 96)  # Back to 5 again: 9 will be another step 9.
  assert [directory.skipped_to(step) for step in (5, 9)] == [96, None]
  directory.drop_rows_after(4)
  assert directory.skipped_to(5) is None


@pytest.mark.parametrize("text", ["", '{"5": 8', "[5]", '{"5": "80"}', '{"five": 80}'])
def test_a_damaged_note_of_data_left_out_is_refused(text, tmp_path):
  (tmp_path / "skips.json").write_text(text)
  directory = RunDirectory(tmp_path)
  for read in (
    directory.skipped_to,
    directory.drop_rows_after,
    lambda step: directory.skip(step, 8),
  ):
    with pytest.raises(Refused, match=r"skips\.json is damaged.*or remove it"):
      read(5)


def test_other_processes_write_nothing(tmp_path):
  directory = RunDirectory(tmp_path / "run", writes=False)
  directory.begin(toys.experiment(), None, allow_changes=False)
  directory.event("start")
  directory.row(1, "train", {})
  directory.drop_rows_after(0)
  directory.close()
  assert not (tmp_path / "run").exists()


def test_what_failed_to_be_written_is_named(tmp_path):
  directory = RunDirectory(tmp_path)
  directory.row(1, "train", {})

  class Full:
    def write(self, text):
      raise OSError(errno.ENOSPC, "No space left on device")

    close = write

  directory._files["metrics.jsonl"] = Full()
  with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
    directory.row(2, "train", {})


def test_other_data_than_the_run_began_with_is_refused(tmp_path):
  first = begin(tmp_path)
  first.check_data("a")
  first.row(1, "train", {"loss": 1.0})
  first.check_data("a")
  with pytest.raises(Refused, match="the files of the data are not those"):
    first.check_data("b")
  first.close()
  begin(tmp_path, allow_changes=True).check_data("b")
  begin(tmp_path).check_data("b")


def test_what_is_not_finite_is_null(tmp_path):
  directory = begin(tmp_path)
  directory.row(1, "train", {"loss": float("nan"), "weight": 2.0})
  (row,) = directory.rows("train")
  assert row == {"step": 1, "kind": "train", "time": row["time"], "loss": None, "weight": 2.0}


def test_records_that_are_not_what_they_should_be_are_left_out(tmp_path):
  directory = RunDirectory(tmp_path)
  directory.row(1, "train", {"loss": 0.5})
  directory.event("start", devices=8)
  directory.close()
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b'[]\n{"step": "2", "kind": "train"}\n{"step": 2}\n\xff\n' + b"[" * 100_000 + b"\n")
    file.write(b'{"step": 2, "kind": "train", "loss": 0.25, "time": [], "goodput": "x"}\n')
  with (tmp_path / "events.jsonl").open("ab") as file:
    file.write(b'{"event": "start"}\n{"time": 1, "event": "save", "step": {}}\n{"time": 1}\n\xfe')
  assert [(r["step"], r["loss"]) for r in directory.rows("train")] == [(1, 0.5), (2, 0.25)]
  assert directory.rows("train")[1].keys() == {"step", "kind", "loss"}
  assert [event["devices"] for event in directory.events()] == [8]
  assert [row["step"] for row in directory.drop_rows_after(1)] == [2]
  directory.event("end")
  assert len(directory.events()) == 2
