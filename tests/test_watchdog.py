"""Every hang ends within its limit, on all processes, and says who was missing and where."""

import contextlib
import dataclasses
import re
import signal
import sys
import time
import types

import pytest

from bigtrain import Checkpoints, phases, watchdog
from bigtrain.config import Refused
from bigtrain.deadlines import Deadlines, limit
from bigtrain.exit_codes import Exit
from bigtrain.heartbeats import Beat, Ending, Heart, latecomers, missing, stragglers
from bigtrain.supervise import Restarts
from tests import runs

pytestmark = pytest.mark.usefixtures("prepared")


# What is watched, and what is made of it.


def test_phases_are_timed_apart_from_those_inside_them(monkeypatch):
  clock = iter([0.0, 1.0, 3.0, 7.0, 8.0])
  monkeypatch.setattr(phases.time, "monotonic", lambda: next(clock))
  doing = phases.Doing()
  monkeypatch.setattr(phases, "doing", doing)
  with phases.within("loop"):
    with phases.within("step"):
      assert (doing.name, doing.since) == ("step", 3.0)
    assert (doing.name, doing.since) == ("loop", 7.0)
  assert doing.seconds == {"start": 1.0, "loop": 3.0, "step": 4.0}
  assert doing.own_seconds() == 3.0


def test_the_median_step_counts_no_time_away_from_training(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
  doing = phases.Doing()
  monkeypatch.setattr(phases, "doing", doing)
  phases.stepped(40)
  with phases.within("loop"):
    for step in range(41, 51):
      with phases.within("step"):
        now[0] += 2
      if step == 45:
        with phases.within("evaluate"):
          now[0] += 1000
      phases.stepped(step)
  assert (doing.first, doing.step, doing.median()) == (40, 50, 2.0)


def test_the_limit_of_a_step_follows_the_usual_step_and_has_a_floor():
  d = Deadlines()
  assert limit(d, "step", 1.0) == d.step and limit(d, "loop", 100.0) == 100 * d.step_times
  assert limit(d, "compile", 100.0) == d.compile and limit(d, "verify", 1.0) == d.other
  assert limit(Deadlines(step=0), "step", 100.0) == 0 and limit(d, "join", 1.0) == 0


def test_the_docs_have_every_limit():
  text = (runs.ROOT / "docs/long_runs.md").read_text()
  found = {name: float(n) for name, n in re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.M)}
  limits = {f.name: getattr(Deadlines(), f.name) for f in dataclasses.fields(Deadlines)}
  assert limits.pop("step_times") == 20 and found == limits


def test_a_save_may_not_take_longer_than_the_run_waits_for_it():
  Deadlines().check_save(Checkpoints().within)
  Deadlines(save=0.0).check_save(1e9)
  with pytest.raises(Refused, match=r"give --deadlines.save 3600, or a smaller --checkpoints.with"):
    Deadlines().check_save(3600.0)


def test_a_negative_limit_is_refused():
  with pytest.raises(Refused, match=r"deadlines.save is -1.*at least 0"):
    Deadlines(save=-1.0).check()
  with pytest.raises(Refused, match=r"restarts.limit is -2"):
    Restarts(limit=-2).check()


def test_who_is_missing_is_silent_or_does_something_else_while_others_wait():
  waits = Beat("step", 7, 9.0)
  assert missing({0: waits, 1: waits._replace(silent=9), 2: waits}, 6) == [1]
  assert missing({0: waits, 1: Beat("input", 7, 9.0), 2: waits._replace(step=8)}, 6) == [1]
  assert missing({0: waits, 1: waits._replace(step=4)}, 6) == [1]
  assert missing({0: waits, 1: waits._replace(step=6)}, 6) == []  # One step is handed over ahead.
  assert missing({p: Beat("save", 7, 9.0) for p in range(3)}, 6) == []


def test_who_keeps_most_others_waiting_is_named_before_it_is_given_up():
  beats = {p: Beat("step", 7, 30.0 + p) for p in range(3)} | {3: Beat("input", 7, 30.0)}
  assert [(late.process, late.seconds) for late in latecomers(beats, 10)] == [(3, 30.0)]
  assert not [*latecomers(beats, 31)]
  assert not [*latecomers(beats | {3: Beat("input", 7, 0.1)}, 10)]  # It has just come to that.


@pytest.mark.parametrize("own, found", [(0.9, [2]), (0.25, []), (0.11, [])])
def test_who_works_longer_at_each_step_than_most_is_named(own, found):
  before = {p: Beat("step", 10, 0.0, own=5.0) for p in range(4)}
  after = {p: Beat("step", 30, 0.0, own=7.0) for p in range(4)}  # 0.1 s a step.
  after[2] = after[2]._replace(own=5 + 20 * own)
  assert [late.process for late in stragglers(before, after, 1.0)] == found
  # The same seconds beside a step that does not hide them.
  assert not found or stragglers(before, after, 0.3)


@pytest.fixture
def dog():
  """A watchdog that looks when it is asked to."""
  phases.doing.__init__()
  dog = watchdog.Watchdog(Deadlines(start=60.0, step=10.0, save=60.0), "nowhere")
  dog.stop()
  yield dog
  phases.doing.__init__()


def test_time_in_which_the_whole_process_was_stopped_is_no_hang(dog):
  since = phases.doing.since
  assert dog._trouble(since + 59) is None and dog._trouble(since + 61)[0] == Exit.DEADLINE
  dog._excuse(since + 10, since + 110)
  assert dog._trouble(since + 159) is None and dog._trouble(since + 161)[0] == Exit.DEADLINE
  dog._excuse(since - 50, since + 10)  # Of a phase that began in that time, what is of it.
  assert dog._trouble(since + 169) is None and dog._trouble(since + 171)[0] == Exit.DEADLINE


def test_a_hang_is_told_with_the_setting_that_limits_it(dog):
  since = phases.doing.since
  assert dog._trouble(since + 61)[1].endswith("its limit is 60 s (--deadlines.start)")
  phases.enter("loop")
  assert dog._trouble(since + 61)[1].endswith("its limit is 10 s (--deadlines.step)")
  phases.enter("examine")
  assert dog._trouble(since + 1900)[1].endswith("its limit is 1800 s (--deadlines.other)")


class Values:
  """The key-value store of jax's coordination service."""

  def __init__(self):
    self.values: dict[str, str] = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, folder):
    return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def pair(dog, monkeypatch):
  """What a watchdog says seconds later, after two beats of both processes; and what these do."""
  now, peer = [phases.doing.since], phases.Doing()
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  store, own = Values(), phases.doing
  hearts = [Heart(store, p, 2, dog.deadlines) for p in range(2)]

  def look(process: int, seconds: float):
    now[0] += seconds
    for p in (1, 0, 1, 0):
      monkeypatch.setattr("bigtrain.heartbeats.doing", [own, peer][p])
      hearts[p]._beat()
    monkeypatch.setattr(watchdog, "doing", [own, peer][process])
    dog.heart = hearts[process]
    return dog._trouble(now[0])

  def does(process: int, phase: str):
    one = [own, peer][process]
    one.name, one.since = phase, now[0]

  return look, does


@pytest.mark.parametrize("waiting, working", [(0, 1), (1, 0)])
@pytest.mark.parametrize("phase", ["step", "agree", "loop"])
def test_who_waits_for_others_at_work_does_not_hang(pair, dog, waiting, working, phase):
  look, does = pair
  dog.deadlines.agree = 10.0
  does(waiting, phase)
  does(working, "save")
  for _ in range(10):  # Within the 60 s that process may take.
    assert look(waiting, 5.0) is None and look(working, 0.0) is None
  does(working, "step")  # It has come to the others: from now on all wait.
  assert look(waiting, 0.0) is None and look(waiting, 9.0) is None
  assert look(waiting, 2.0)[0] == Exit.DEADLINE


def test_who_waits_ends_when_the_other_has_taken_too_long_or_falls_silent(pair, monkeypatch):
  look, does = pair
  does(0, "step")
  does(1, "save")
  assert look(0, 59.0) is None
  assert look(1, 2.0)[0] == Exit.DEADLINE  # Its own limit ends it, else that of the other would.
  assert look(0, 7.0) is None and look(0, 2.0)[0] == Exit.DEADLINE
  does(1, "save")
  assert look(0, 1.0) is None
  monkeypatch.setattr(Heart, "_beat", lambda heart: None)
  assert look(0, 9.0) is None and look(0, 2.0)[0] == Exit.DEADLINE


def test_all_in_one_phase_wait_for_nobody(pair):
  look, does = pair
  for p in range(2):
    does(p, "loop")
  assert look(0, 9.0) is None and look(0, 2.0)[0] == Exit.DEADLINE


def test_who_is_done_ends_by_the_code_of_one_that_fails_in_the_end(pair, dog):
  look, does = pair
  for p in range(2):
    does(p, "end")
  assert look(0, 1.0) is None
  dog.leave(Exit.DONE)
  dog.heart.announce(Ending(1, Exit.FAILED, "a full disk"))
  look(0, 1.0)
  code, text = look(0, watchdog.GRACE + 1)
  assert code == Exit.FAILED and "a full disk" in text


def test_a_disk_that_hangs_while_a_straggler_is_told_does_not_stop_the_watch(
  pair, dog, monkeypatch
):
  look, does = pair
  monkeypatch.setattr(watchdog, "PATIENCE", 0.1)
  monkeypatch.setattr(watchdog, "add_event", lambda *_, **__: signal.pause())
  does(0, "step")
  does(1, "save")
  look(0, 20.0)
  dog._name_stragglers(dog.heart, 1e9)
  assert dog._named.keys() == {1}


# Real processes.

SOON = ("--deadlines.step", "8", "--deadlines.input", "60", "--deadlines.silence", "16")
STEPS = ("--steps", "3000", "--evaluation.every", "0", "--checkpoints.every", "1000")


@contextlib.contextmanager
def started(run_dir, processes: int, *arguments: str, **environment: str):
  all_of = [
    runs.start(run_dir, *arguments, file="tests/troubled.py", **each, **environment)
    for each in runs.joined(processes)
  ]
  try:
    yield all_of
  finally:
    for process in all_of:
      process.kill()
      process.communicate()


def stacks(run_dir) -> dict[int, str]:
  """By process, of the one hang there was."""
  files = sorted((run_dir / "hangs").iterdir())
  return {int(path.stem.rpartition("-")[2]): path.read_text() for path in files}


@pytest.mark.parametrize(
  "processes, stopped",
  [
    (2, 1),
    pytest.param(2, 0, marks=pytest.mark.slow),
    pytest.param(4, 2, marks=pytest.mark.slow),
  ],
)
def test_a_stopped_process_ends_all_others_within_the_limit(tmp_path, processes, stopped):
  with started(tmp_path, processes, *SOON, *STEPS) as all_of:
    runs.wait_until(all_of[0], lambda: runs.lines(tmp_path / "metrics.jsonl") > 5)
    all_of[stopped].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    others = [process for i, process in enumerate(all_of) if i != stopped]
    ended = [runs.finish(process) for process in others]
    assert time.monotonic() - since < 8 + 2 * watchdog.PATIENCE
    assert [code for code, _ in ended] == [Exit.DEADLINE] * (processes - 1), "\n".join(
      err for _, err in ended
    )
    assert all_of[stopped].poll() is None
  found = stacks(tmp_path)
  assert found.keys() == set(range(processes)) - {stopped}
  assert all("last step: " in text and "in loop\n" in text for text in found.values())
  first = min(found)
  assert f"process {stopped} is missing: " in found[first]
  if stopped:
    (hang,) = runs.events(tmp_path, "hang")
    assert hang["missing"] == [stopped] and hang["phase"] == "step"
    assert "silent" in hang["where"][str(stopped)]


def test_a_process_that_waits_for_its_data_is_named_and_shows_where(tmp_path):
  limits = (*SOON, "--deadlines.input", "12")
  with started(tmp_path, 2, *limits, *STEPS, TROUBLE="hang 1 80") as both:
    ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.DEADLINE] * 2, ended
  (straggler,), (hang,) = runs.events(tmp_path, "straggler"), runs.events(tmp_path, "hang")
  assert straggler["process"] == 1 and "in input" in straggler["why"]
  assert hang["missing"] == [1] and "in input" in hang["where"]["1"]
  # Who waited for it did so for longer than a step may last.
  assert "input has lasted 12 s" in hang["cause"] and "in trouble\n" in stacks(tmp_path)[1]


def test_a_process_that_fails_ends_the_others_at_once_and_all_by_its_code(tmp_path):
  limits = ("--deadlines.silence", "16", *STEPS)
  with started(tmp_path, 2, *limits, TROUBLE="fail 1 80") as both:
    ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.FAILED] * 2, ended
  assert "RuntimeError: a troubled row" in ended[1][1]
  assert any("a troubled row" in event["error"] for event in runs.events(tmp_path, "error"))
  assert not (tmp_path / "hangs").exists()


@pytest.mark.slow
def test_a_slow_host_is_named_while_the_run_goes_on(tmp_path):
  arguments = ("--steps", "60", "--deadlines.silence", "16")
  with started(tmp_path, 2, *arguments, TROUBLE="slow 1 80") as both:
    ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.DONE] * 2, ended
  (straggler,) = runs.events(tmp_path, "straggler")
  assert straggler["process"] == 1 and straggler["seconds"] > 0.1


@pytest.mark.slow
def test_processes_wait_for_one_that_prepares_data_and_compiles_for_longer(tmp_path):
  limits = ("--deadlines.step", "10", "--deadlines.agree", "10")
  with started(tmp_path, 2, *limits, LATE="1 20") as both:
    ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.DONE] * 2, ended


def test_a_last_save_that_one_process_finds_damaged_ends_all_alike(tmp_path):
  arguments = ("--steps", "16", "--checkpoints.every", "8", "--evaluation.every", "0")
  with started(tmp_path, 2, *arguments, TROUBLE="unsaved 0 16") as both:
    ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.FAILED] * 2, ended
  assert all("what was read back is damaged" in err for _, err in ended)
  assert not runs.events(tmp_path, "end")


def test_a_process_that_was_stopped_for_longer_than_a_step_may_last_goes_on(tmp_path):
  limits = ("--deadlines.step", "5", "--deadlines.input", "5", "--deadlines.evaluate", "5")
  with started(tmp_path, 1, *limits, "--steps", "100") as (process,):
    runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") > 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    code, err = runs.finish(process)
  assert code == Exit.DONE, err


def test_a_run_that_failed_waits_for_no_thread_of_a_library(dog, monkeypatch):
  monkeypatch.setattr(watchdog.hangs, "leave", sys.exit)
  with pytest.raises(SystemExit) as ended:
    dog.leave(Exit.FAILED)
  assert ended.value.code == Exit.FAILED
  dog.leave(Exit.DONE)
  assert dog.code == Exit.DONE


def test_a_run_that_failed_asks_nobody_where_the_first_process_is_stopped(dog, monkeypatch):
  monkeypatch.setattr(watchdog.hangs, "leave", sys.exit)
  asked = []
  silent = types.SimpleNamespace(
    key_value_set=lambda *_, **__: asked.append("set"), key_value_dir_get=asked.append
  )
  dog.heart = Heart(silent, 1, 2, dog.deadlines)
  dog.heart.heard -= 100
  with pytest.raises(SystemExit) as ended:
    dog.leave(Exit.FAILED)
  assert ended.value.code == Exit.FAILED and asked == []


def test_one_process_that_hangs_ends_too_and_says_where(tmp_path):
  with started(tmp_path, 1, "--deadlines.input", "2", TROUBLE="hang 0 80") as (process,):
    code, err = runs.finish(process)
  assert code == Exit.DEADLINE, err
  assert "input has lasted 2 s, and its limit is 2 s" in err
  (hang,) = runs.events(tmp_path, "hang")
  assert hang["phase"] == "input" and hang["missing"] == []
  assert "in trouble\n" in stacks(tmp_path)[0]
