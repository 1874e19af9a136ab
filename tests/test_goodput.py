"""Where time went, of records made by hand whose sums are known, and of real runs."""

import pytest

from bigtrain import goodput
from bigtrain.goodput import KINDS, Meter, account, resume
from bigtrain.run_directory import RunDirectory
from tests import runs


def event(name: str, time: float, **fields) -> dict:
  return {"time": time, "event": name, **fields}


def row(step: int, time: float | None = None, wait: float = 0.0) -> dict:
  found = {"step": step, "kind": "train", "step_seconds": 1.0, "input_wait_seconds": wait}
  return found if time is None else found | {"time": time}


def spent(events, rows=()) -> dict[str, float]:
  """What is not zero, after checking that the stretches leave no gap and do not overlap."""
  found = account(events, rows)
  for before, after in zip(found.stretches[:-1], found.stretches[1:], strict=True):
    assert before.ended == after.began
  assert all(s.ended >= s.began for s in found.stretches)
  whole = found.stretches[-1].ended - found.stretches[0].began
  assert found.wall == pytest.approx(whole)
  assert tuple(found.seconds) == KINDS
  return {kind: round(s, 6) for kind, s in found.seconds.items() if s}


# 2 seconds before the start was written, 5 + 1 of data, 3 of initialising, 10 of compiling; then 10
# steps of a second, an evaluation of 4 and a save of 1; 10 more steps, and a save of 1 that is
# durable 2 seconds later.
WHOLE = [
  event("start", 100, seconds=2),
  event("data", 106, seconds=5),
  event("initialise", 109, seconds=3),
  event("compile", 120, seconds=10),
  event("evaluate", 134, step=10, seconds=4),
  event("save", 135, step=10, seconds=1),
  event("save", 146, step=20, seconds=1),
  event("end", 148),
]


def test_every_second_of_a_quiet_run_has_one_kind():
  found = spent(WHOLE, [row(10, wait=0.1), row(20, wait=0.2)])
  # The first step of a start is not measured: 9 steps waited 0.1, 10 waited 0.2.
  assert found == {
    "compute": 20 - 2.9, "input wait": 2.9, "compile": 10, "checkpoint": 4, "evaluation": 4,
    "start-up": 2 + 6 + 3 + 1,
  }  # fmt: skip
  assert account(WHOLE, []).goodput == 20 / 50
  assert account(WHOLE, []).attempts == [(98, 148, 0, "end")]


# What the run above becomes where it is killed 5 steps after the save of step 10, and goes on.
KILLED = [
  *WHOLE[:6],
  event("restart", 165, attempt=1, code=1, after_seconds=3),
  event("start", 170, seconds=2),
  event("data", 171, seconds=1),
  event("restore", 174, step=10, seconds=3),
  event("resume", 174, step=10, lost_steps=5, lost_seconds=5, until=140),
  event("compile", 180, seconds=6),
  event("save", 191, step=20, seconds=1),
  event("end", 191),
]


def test_steps_after_the_save_that_a_start_went_on_from_are_lost_and_the_gap_is_idle():
  found = spent(KILLED, [row(10), row(20)])
  assert found == {
    "compute": 20, "compile": 16, "checkpoint": 2, "evaluation": 4, "restore": 3,
    "start-up": 12 + 2 + 1, "lost work": 5, "idle": 168 - 140,
  }  # fmt: skip
  assert [a.outcome for a in account(KILLED, []).attempts] == ["killed", "end"]
  assert [a.step for a in account(KILLED, []).attempts] == [0, 10]


def test_the_last_row_tells_how_long_an_attempt_lived_that_is_not_resumed_yet():
  rows = [row(10, 130.0), row(15, 140.0)]
  assert spent(WHOLE[:6], rows)["compute"] == 15
  assert account(WHOLE[:6], rows).attempts == [(98, 140, 0, "killed")]
  # Rows of an older version have no time: what is known ends with the last event.
  assert spent(WHOLE[:6], [row(10), row(15)])["compute"] == 10


def test_an_evaluation_of_steps_that_were_lost_is_lost_with_them():
  records = [*KILLED[:6], event("evaluate", 142, step=15, seconds=2), *KILLED[6:]]
  assert spent(records)["lost work"] == 7


def test_a_run_that_left_loses_nothing():
  records = [*WHOLE[:6], event("signal", 139, step=14), event("save", 140, step=14, seconds=1)]
  records += [event("left", 141), event("start", 161), event("restore", 163, step=14, seconds=2)]
  records += [event("resume", 163, step=14, lost_steps=0, lost_seconds=0, until=None)]
  records += [event("compile", 170, seconds=7), event("save", 177, step=20, seconds=1)]
  found = spent([*records, event("end", 177)])
  assert "lost work" not in found and found["idle"] == 20 and found["compute"] == 10 + 4 + 6


def test_steps_behind_the_last_save_of_a_run_that_was_stopped_at_once_are_no_checkpoint():
  stopped = event("left", 1126, cause="process 1 ended: stopped at once")
  found = spent([*WHOLE[:6], stopped])
  assert found["checkpoint"] == 1 and found["compute"] == 10 + 1126 - 135
  # Nor is what a run did that rolled back behind it, and then left.
  back = [event("restore", 145, step=10, seconds=1), event("left", 149)]
  assert spent([*WHOLE[:6], *back])["checkpoint"] == 1


def test_all_steps_are_lost_where_nothing_had_been_saved():
  again = [{**e, "time": e["time"] + 100} for e in WHOLE]
  found = spent([*WHOLE[:4], *again], [row(5, 125.0)])
  assert found["lost work"] == 5 and found["compute"] == 20 and found["compile"] == 20


def test_a_damaged_checkpoint_loses_what_an_earlier_start_had_gone_on_from():
  # The second start goes on from step 10 and does 10 steps; a third finds 10 and 20 damaged.
  third = [
    event("start", 200),
    event("damaged", 201, step=20, moved_to="x", why="y"),
    event("initialise", 205, seconds=1),
    event("compile", 210, seconds=1),
    event("save", 231, step=20, seconds=1),
    event("end", 231),
  ]
  found = spent([*KILLED, *third])
  assert found["lost work"] == 10 + 4 + 5 + 10 and found["compute"] == 20
  assert "evaluation" not in found


def test_a_resume_tells_the_step_where_a_restore_does_not():
  records = [{k: v for k, v in e.items() if (k, e["event"]) != ("step", "restore")} for e in KILLED]
  assert spent(records, [row(10), row(20)]) == spent(KILLED, [row(10), row(20)])
  assert account(records, []).attempts[1].step == 10


def test_a_rollback_loses_the_steps_it_goes_back_over():
  records = [*WHOLE[:6], event("restore", 143, step=10, seconds=1)]
  records += [event("rollback", 143, step=17, to=10), event("save", 154, step=20, seconds=1)]
  found = spent([*records, event("end", 154)])
  assert found["lost work"] == 7 and found["compute"] == 20 and found["restore"] == 1


def test_a_hang_is_idle_and_a_straggler_takes_no_time_of_its_own():
  records = [*WHOLE[:6], event("straggler", 138, process=3, seconds=90)]
  records += [event("hang", 175, phase="step", missing=[1], seconds=30)]
  found = spent(records)
  assert found["idle"] == 30 and found["compute"] == 20


def test_a_phase_within_another_is_counted_once():
  records = [event("start", 0), event("compile", 3, seconds=2), event("evaluate", 10, seconds=6)]
  assert spent([*records, event("end", 12)]) == {
    "start-up": 1, "compile": 2, "compute": 3, "evaluation": 6,
  }  # fmt: skip
  assert spent([*records[:2], event("compile", 7, seconds=2), *records[2:]]) == {
    "start-up": 1, "compile": 4, "compute": 1, "evaluation": 4,
  }  # fmt: skip


def test_clocks_that_drift_or_jump_make_no_time_twice_and_none_negative():
  # By its length the second phase began 1 second before the first was over; then the clock is set
  # back by an hour.
  records = [event("start", 0), event("compile", 10, seconds=10), event("save", 20, seconds=11)]
  assert spent(records) == {"compile": 10, "checkpoint": 10}
  assert spent([*records, event("start", -3580), event("compile", -3570, seconds=5)])


def test_a_phase_without_a_known_name_is_other():
  assert spent([*WHOLE[:6], event("replay", 140, seconds=5)])["other"] == 5


def test_nothing_recorded_is_no_time():
  found = account([], [])
  assert found.wall == found.goodput == 0 and not found.attempts


def test_a_run_that_was_killed_accounts_for_itself(prepared, tmp_path):
  run = tmp_path / "run"
  process = runs.start(run, "--steps", "20")
  runs.wait_until(process, lambda: runs.lines(run / "metrics.jsonl") >= 8)
  process.kill()
  process.communicate()
  rows = [r for r in runs.read(run, "metrics.jsonl") if r["kind"] == "train"]
  code, err = runs.finish(runs.start(run, "--steps", "20"))
  assert code == 0, err
  (resumed,) = runs.events(run, "resume")
  assert resumed["lost_steps"] == rows[-1]["step"] - resumed["step"]
  assert resumed["until"] == (rows[-1]["time"] if resumed["lost_steps"] else None)
  assert 0 <= resumed["lost_seconds"] < 60
  directory = RunDirectory(run, writes=False)
  found = account(directory.events(), directory.rows("train"))
  assert found.seconds["lost work"] == pytest.approx(resumed["lost_seconds"], abs=0.1)
  assert [a.outcome for a in found.attempts] == ["killed", "end"]
  assert found.seconds["compile"] == pytest.approx(
    sum(e["seconds"] for e in runs.events(run, "compile")), abs=0.01
  )
  (said,) = runs.events(run, "goodput")
  assert said["goodput"] == pytest.approx(found.goodput, abs=0.02)
  assert sum(said["of"].values()) == pytest.approx(said["wall"], abs=0.05)
  last = directory.rows("train")[-1]
  # While it trains it is not known yet which steps will be lost; of this start none is.
  assert 0 < last["goodput"] < 1
  assert directory.events()[-1]["event"] == "end"


def test_a_rollback_within_a_start_tells_what_it_lost(tmp_path):
  directory = RunDirectory(tmp_path)
  for e in [*WHOLE[:6], event("restore", 143, seconds=1), event("rollback", 143, step=17, to=10)]:
    directory._append("events.jsonl", e)
  for step in (10, 13, 16):
    directory._append("metrics.jsonl", row(step, 125.0 + step))
  resume(directory, 10)
  directory.close()
  (told,) = [e for e in directory.events() if e["event"] == "resume"]
  assert (told["step"], told["lost_steps"], told["lost_seconds"], told["until"]) == (10, 6, 7, 141)
  assert [r["step"] for r in directory.rows("train")] == [10]


def test_a_wall_clock_that_is_set_back_makes_no_more_than_all_of_the_time(tmp_path, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(goodput.time, "time", lambda: now[0])
  meter = Meter(RunDirectory(tmp_path))
  now[0] = 1010.0
  assert meter.add(8.0, 3.0) == pytest.approx(0.5)
  now[0] = 500.0
  assert meter.add(5.0, 0.0) == 1.0
