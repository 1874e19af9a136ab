"""A run that is killed, stopped or refused goes on as if nothing had happened."""

import os
import random
import shutil
import signal
import sys
import time

import pytest

from bigtrain import processes
from bigtrain.cli import main
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.parts import Part
from bigtrain.train import train
from tests import runs

LONG = ("--steps", "60")  # Over a second, of which the saves take most.


pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The rows of a run of its own that nothing disturbed."""
  run_dir = tmp_path_factory.mktemp("whole") / "run"
  code, err = runs.finish(runs.start(run_dir, *LONG))
  assert code == Exit.DONE, err
  return runs.values(run_dir)


def kill(process, moment) -> None:
  runs.wait_until(process, moment)
  process.kill()
  process.wait()


def finish_and_compare(run_dir, expected) -> None:
  code, err = runs.finish(runs.start(run_dir, *LONG))
  assert code == Exit.DONE, err
  assert runs.values(run_dir) == expected
  assert len(set(runs.keys(run_dir))) == len(expected)
  assert runs.saved(run_dir) == [55, 60]


def kill_at_random(run_dir, kills: int, expected) -> None:
  seed = time.time_ns()
  rng = random.Random(seed)
  print(f"random.Random({seed})")
  for i in range(kills):
    rows = rng.randrange(60 * i // kills, 60 * (i + 1) // kills)
    pause = rng.uniform(0, 0.1)

    def moment(rows=rows, pause=pause):
      if runs.lines(run_dir / "metrics.jsonl") < rows:
        return False
      time.sleep(pause)
      return True

    kill(runs.start(run_dir, *LONG), moment)
  finish_and_compare(run_dir, expected)


def test_kills_at_random_moments_change_no_row(tmp_path, uninterrupted):
  kill_at_random(tmp_path, 1, uninterrupted)


@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_row(tmp_path, uninterrupted):
  kill_at_random(tmp_path, 5, uninterrupted)


def test_a_kill_in_the_middle_of_a_save_changes_no_row(tmp_path, uninterrupted):
  path = tmp_path / "checkpoints"

  def saving():
    names = os.listdir(path) if path.exists() else []
    return any("tmp" in name for name in names) and runs.lines(tmp_path / "metrics.jsonl") > 12

  kill(runs.start(tmp_path, *LONG), saving)
  assert any("tmp" in path.name for path in path.iterdir())
  finish_and_compare(tmp_path, uninterrupted)


def test_a_terminal_that_is_closed_leads_it_to_save_and_leave(tmp_path, uninterrupted):
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup a child would ignore it too.
  process = runs.start(tmp_path, *LONG)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") >= 5)
  signal.signal(signal.SIGHUP, before)
  process.stderr.close()
  process.stdout.close()
  process.send_signal(signal.SIGHUP)
  assert process.wait(60) == Exit.LEFT
  assert [event["signal"] for event in runs.events(tmp_path, "signal")] == ["SIGHUP"]
  finish_and_compare(tmp_path, uninterrupted)


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(tmp_path, uninterrupted):
  process = runs.start(tmp_path, *LONG)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") > 7)
  process.send_signal(signal.SIGTERM)
  code, err = runs.finish(process)
  rows = [step for step, kind in runs.keys(tmp_path) if kind == "train"]
  assert code == Exit.LEFT, err
  assert runs.saved(tmp_path)[-1] == rows[-1] < 60
  assert f"saving step {rows[-1]}; the same command goes on from there" in err
  finish_and_compare(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_in_one_line(tmp_path, number):
  process = runs.start(tmp_path)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "events.jsonl") > 0)
  process.send_signal(number)
  code, err = runs.finish(process)
  assert code == Exit.LEFT
  assert err == "bigtrain: stopped at once; what was saved before is whole\n"


class Raise(Part):
  """Signals before an update."""

  def __init__(self, at: int, *numbers: int):
    self.at, self.numbers = at, numbers

  def before_step(self, step):
    if step == self.at:
      for number in self.numbers:
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_after_the_step_and_is_told_in_quiet_too(tmp_path, capfd, number):
  before = signal.getsignal(number)
  run = train(runs.base(), tmp_path, quiet=True, parts=[Raise(7, number)])
  name, err = signal.Signals(number).name, capfd.readouterr().err
  assert run.left and runs.saved(tmp_path) == [5, 8]
  assert run.state.step == 9  # A step more, for who will restore what was saved.
  told = f"bigtrain: {name}: leaving after this step; Ctrl-C again stops at once\n"
  assert told in err and f"{name}: saving step 8" in err
  assert runs.events(tmp_path, "signal")[0]["signal"] == name and runs.events(tmp_path, "left")
  assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once(tmp_path):
  numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    train(runs.base(), tmp_path, quiet=True, parts=[Raise(7, *numbers)])
  assert runs.keys(tmp_path)[-1] in ((6, "train"), (7, "train")) and not runs.events(
    tmp_path, "left"
  )


def test_a_signal_at_the_last_step_leaves_a_finished_run(tmp_path):
  assert not train(runs.base(), tmp_path, quiet=True, parts=[Raise(19, signal.SIGTERM)]).left


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path, capsys):
  train(runs.base(), tmp_path, quiet=True)
  rows, saved = (tmp_path / "metrics.jsonl").read_text(), runs.saved(tmp_path)
  run = train(runs.base(), tmp_path, quiet=True)
  assert f"{tmp_path} has done its 20 steps" in capsys.readouterr().err
  assert (tmp_path / "metrics.jsonl").read_text() == rows and runs.saved(tmp_path) == saved
  assert run.state.step == 20 and len(run.metrics["loss"]) == 20


def test_a_changed_config_is_refused_until_it_is_allowed(tmp_path, capsys):
  command = ["train", str(runs.ROOT / "tests/runs.py"), "--dir", str(tmp_path / "run"), "--quiet"]
  assert main([*command, "--steps", "6"]) == Exit.DONE
  assert main([*command, "--steps", "8", "--optimizer.lr", "0.5"]) == Exit.REFUSED
  err = capsys.readouterr().err
  assert "steps: 6 -> 8" in err and "optimizer.lr: 0.03 -> 0.5" in err and "--allow_changes" in err
  assert main([*command, "--steps", "8", "--optimizer.lr", "0.5", "--allow_changes"]) == Exit.DONE
  assert runs.saved(tmp_path / "run") == [6, 8]
  shutil.rmtree(tmp_path / "run/checkpoints")
  (tmp_path / "run/config.json").unlink()
  assert main([*command, "--steps", "8"]) == Exit.REFUSED


def test_a_start_that_fails_keeps_the_run_for_nobody(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise RuntimeError("no writer")

  with monkeypatch.context() as broken:
    broken.setattr(sys.modules["bigtrain.train"], "default_writers", fail)
    with pytest.raises(RuntimeError, match="no writer") as kept:
      train(runs.base(), tmp_path, quiet=True)
  assert kept.tb is not None  # Whose frames keep the directory, and with it the lock's file.
  assert train(runs.base(), tmp_path, quiet=True).state.step == 20


def test_processes_of_other_configs_write_nothing(tmp_path, monkeypatch):
  def differ(**facts):
    raise Refused(f"the processes differ in {', '.join(facts)}")

  monkeypatch.setattr(processes, "agree", differ)
  with pytest.raises(Refused, match="differ in config"):
    train(runs.base(), tmp_path / "run", quiet=True)
  assert not (tmp_path / "run").exists()


def test_what_is_kept_out_of_the_data_is_told_at_every_start(tmp_path, monkeypatch, capsys):
  folder = tmp_path / "text"
  shutil.copytree(os.environ["RUNS_TEXT"], folder)
  (folder / "empty.txt").touch()
  monkeypatch.setenv("RUNS_TEXT", str(folder))
  for steps in (5, 6):
    experiment = runs.base()
    experiment.steps = steps
    train(experiment, tmp_path / "run", quiet=True, allow_changes=True)
    assert "kept out of the data: 1 x empty file; first" in capsys.readouterr().err
  told = [event["found"] for event in runs.events(tmp_path / "run", "kept_out")]
  assert len(told) == 2 and told[0] == told[1] and "1 x empty file" in told[0]


def test_a_run_that_leaves_between_two_rows_knows_its_highest_loss(tmp_path):
  class Leave(Part):
    def before_step(self, step):
      if step == 5:
        signal.raise_signal(signal.SIGTERM)

  e = runs.base()
  e.steps, e.logging.every = 11, 4
  whole = train(e, tmp_path / "whole", quiet=True)
  assert train(e, tmp_path / "run", quiet=True, parts=[Leave()]).left
  train(e, tmp_path / "run", quiet=True)
  e.logging.every = 1
  losses = [row["loss"] for row in train(e, tmp_path / "each", quiet=True).directory.rows("train")]
  highest = {row["step"]: row["loss_max"] for row in whole.directory.rows("train")}
  expected = {4: max(losses[:4]), 8: max(losses[4:8]), 11: max(losses[8:])}
  assert highest == pytest.approx(expected, rel=1e-6)
  assert runs.values(tmp_path / "run") == runs.values(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_goes_on_does_not_compile_its_step_again(processes, tmp_path):
  (tmp_path / "compiled").mkdir(mode=0o700)
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # Such a small one too.
  }

  def begin():
    each = runs.joined(processes) if processes > 1 else [{}]
    mesh = ("--mesh.fsdp", "-1")
    return [runs.start(tmp_path / "run", *mesh, **own, **cache) for own in each]

  def programs():
    return {path.name for path in (tmp_path / "compiled").glob("jit_step*-cache")}

  leaving = begin()
  runs.wait_until(leaving[0], lambda: runs.lines(tmp_path / "run/metrics.jsonl") >= 5)
  leaving[0].send_signal(signal.SIGTERM)
  assert [runs.finish(process)[0] for process in leaving] == [Exit.LEFT] * processes
  compiled = programs()
  assert compiled
  assert [runs.finish(process)[0] for process in begin()] == [Exit.DONE] * processes
  assert programs() == compiled
