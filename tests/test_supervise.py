"""A supervised run goes on after whatever ends it, and ends when that is of no use."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from bigtrain import supervise as supervise_module
from bigtrain.exit_codes import Exit
from bigtrain.supervise import VARIABLE, Restarts, Supervisor
from tests import runs

CHILD = f"""
import json, os, signal, sys, time
parent, pipe = map(int, os.environ["{VARIABLE}"].split())
starts = open(sys.argv[1], "a")
starts.write("x")
starts.close()
start = os.path.getsize(sys.argv[1])
def tell(**about):
  os.write(pipe, json.dumps(about).encode() + b"\\n")
"""


def supervise(tmp_path, code: str, **restarts) -> tuple[int, int]:
  """The exit code of the supervisor of a child that is not of ours, and how often it started."""
  starts = tmp_path / "starts"
  restarts = {"wait": 0.0, "limit": 3} | restarts
  command = [sys.executable, "-c", CHILD + code, str(starts)]
  found = Supervisor(command, Restarts(**restarts)).run()
  return found, starts.stat().st_size


@pytest.mark.parametrize("code", [Exit.DONE, Exit.REFUSED, Exit.CHECK])
def test_what_a_restart_cannot_help_is_not_restarted(tmp_path, code):
  assert supervise(tmp_path, f"sys.exit({code.value})") == (code, 1)


@pytest.mark.parametrize(
  "end", ["sys.exit(1)", "sys.exit(5)", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_what_failed_hung_left_or_was_killed_is_started_again(tmp_path, end, capfd):
  assert supervise(tmp_path, f"if start < 3: {end}") == (Exit.DONE, 3)
  lines = capfd.readouterr().err.splitlines()
  assert len(lines) == 2 and "restart 2 of 3 in 0 s" in lines[1]


def test_restarts_without_a_newer_checkpoint_come_to_an_end(tmp_path, capfd):
  assert supervise(tmp_path, "tell(first=40, step=44, phase='step'); sys.exit(5)") == (5, 4)
  told = "(deadline), last heard of at step 44, in step; giving up after 3 restarts"
  assert told in capfd.readouterr().err


def test_a_newer_checkpoint_begins_the_count_anew(tmp_path):
  code = "tell(first=(start // 3) * 100); sys.exit(0 if start > 11 else 1)"
  assert supervise(tmp_path, code) == (Exit.DONE, 12)


def test_restarts_wait_twice_as_long_each_time_up_to_a_limit_and_are_recorded(tmp_path):
  code = f"tell(dir={str(tmp_path / 'run')!r}, step=7, process=0); sys.exit(1)"
  assert supervise(tmp_path, code, wait=0.1, longest=0.25) == (Exit.FAILED, 4)
  found = runs.events(tmp_path / "run", "restart")
  assert [(e["attempt"], e["after_seconds"]) for e in found] == [(1, 0.1), (2, 0.2), (3, 0.25)]
  assert all(e["code"] == Exit.FAILED and e["step"] == 7 for e in found)
  times = [e["time"] for e in found]
  assert times[1] - times[0] >= 0.1 and times[2] - times[1] >= 0.2


@pytest.mark.parametrize("process", [1, None])
def test_only_the_supervisor_of_what_is_known_to_be_the_first_process_records(tmp_path, process):
  code = f"tell(dir={str(tmp_path / 'run')!r}, process={process}); sys.exit(1)"
  assert supervise(tmp_path, code) == (Exit.FAILED, 4)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("silent", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_child_without_a_sign_of_life_is_ended(tmp_path, silent, capfd):
  code = f"tell(step=3)\nif start == 1: {silent}"
  assert supervise(tmp_path, code, silence=0.7) == (Exit.DONE, 2)
  err = capfd.readouterr().err
  assert "no sign of life for 1 s" in err
  assert "ended without a sign of life, last heard of at step 3" in err


def test_a_child_that_closed_its_pipe_and_lives_is_ended_too(tmp_path):
  since = time.monotonic()
  code = "if start == 1:\n  tell(step=3)\n  os.close(pipe)\n  time.sleep(60)"
  assert supervise(tmp_path, code, silence=0.7) == (Exit.DONE, 2)
  assert time.monotonic() - since < 30


def test_without_a_limit_a_child_may_be_silent(tmp_path):
  assert supervise(tmp_path, "tell(step=3); time.sleep(1)", silence=0.0) == (Exit.DONE, 1)


def test_a_child_that_cannot_be_killed_is_no_endless_wait(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(supervise_module, "KILL", 0.2)
  monkeypatch.setattr(subprocess.Popen, "kill", lambda self: None)
  code = "signal.signal(signal.SIGABRT, signal.SIG_IGN); tell(step=3); time.sleep(12)"
  assert supervise(tmp_path, code, silence=0.7) == (Exit.DEADLINE, 1)
  assert re.search(r"process \d+ cannot be killed and holds the run", capfd.readouterr().err)


def test_the_first_command_is_given_until_a_child_has_made_steps(tmp_path):
  said = tmp_path / "said"
  tell = "tell(first=5, step=5 + (start > 2) * 3); time.sleep(0.3); sys.exit(start < 5)"
  code = f"{CHILD}open({str(said)!r}, 'a').write(sys.argv[2]); {tell}"
  first, later = (
    [sys.executable, "-c", code, str(tmp_path / "starts"), word] for word in ("first ", "later ")
  )
  assert Supervisor(first, Restarts(wait=0.0), later).run() == Exit.DONE
  assert said.read_text() == "first " * 3 + "later " * 2


SUPERVISOR = """
import sys
from bigtrain.supervise import Restarts, Supervisor
restarts = Restarts(wait=60.0, silence=float(sys.argv[3]))
code = Supervisor([sys.executable, "-c", sys.argv[1], sys.argv[2]], restarts).run()
assert "jax" not in sys.modules
sys.exit(code)
"""


def stop_and_go_on(process, seconds: float) -> None:
  """A supervisor with its child; it wakes first, and finds that nothing was told."""
  both = child_of(process), process.pid
  for pid in both:
    os.kill(pid, signal.SIGSTOP)
  time.sleep(seconds)
  for pid in reversed(both):
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.5)


@contextlib.contextmanager
def supervisor(tmp_path, child: str, silence: float = 180.0):
  """A supervisor that is a process, once its child has started."""
  command = [sys.executable, "-c", SUPERVISOR, CHILD + child, str(tmp_path / "starts")]
  command.append(str(silence))
  process = subprocess.Popen(command, cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
  runs.wait_until(process, (tmp_path / "ready").exists)
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def leaving(ready, *, deaf: bool = False) -> str:
  """A child that takes a moment to leave; a deaf one heeds Ctrl-C alone."""
  return f"""
def leave(number, frame):
  time.sleep(0.3)
  sys.exit({Exit.LEFT.value})
signal.signal(signal.SIGTERM, {"signal.SIG_IGN" if deaf else "leave"})
signal.signal(signal.SIGINT, {"leave" if deaf else "signal.SIG_IGN"})
open({str(ready)!r}, "w").close()
for _ in range(600):
  time.sleep(0.1)  # A signal just before a sleep does not end it.
"""


def test_a_supervisor_that_was_stopped_with_its_child_does_not_end_it(tmp_path):
  ready = tmp_path / "ready"
  child = f"""
tell(step=1)
open({str(ready)!r}, "w").close()
until = time.monotonic() + 6
while time.monotonic() < until:
  time.sleep(0.2)
  tell(step=2)
"""
  with supervisor(tmp_path, child, silence=3.0) as process:
    stop_and_go_on(process, 4.0)
    assert process.wait(20) == Exit.DONE
    assert "no sign of life" not in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(tmp_path, number):
  with supervisor(tmp_path, leaving(tmp_path / "ready")) as process:
    process.send_signal(number)
    assert process.wait(20) == Exit.LEFT


def test_a_second_ctrl_c_is_passed_on_as_one(tmp_path):
  with supervisor(tmp_path, leaving(tmp_path / "ready", deaf=True)) as process:
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == Exit.LEFT


def test_a_signal_between_two_starts_ends_the_wait(tmp_path):
  with supervisor(tmp_path, f"open({str(tmp_path / 'ready')!r}, 'w'); sys.exit(1)") as process:
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == Exit.LEFT


# The command.

pytestmark = pytest.mark.usefixtures("prepared")
LONG = ("--steps", "60", "--supervise", "--restarts.wait", "0.1")


def child_of(process) -> int:
  with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
    return int(file.read().split()[0])


def test_a_killed_run_is_started_again_and_changes_no_row(tmp_path):
  code, err = runs.finish(runs.start(tmp_path / "whole", "--steps", "60"))
  assert code == Exit.DONE, err
  process = runs.start(tmp_path / "run", *LONG)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "run/metrics.jsonl") > 22)
  os.kill(child_of(process), signal.SIGKILL)
  code, err = runs.finish(process)
  assert code == Exit.DONE, err
  assert runs.values(tmp_path / "run") == runs.values(tmp_path / "whole")
  (restart,) = runs.events(tmp_path / "run", "restart")
  assert restart["cause"] == "killed by SIGKILL" and restart["attempt"] == 1
  assert "killed by SIGKILL, last heard of at step" in err and "restart 1 of 10 in 0.1 s" in err


def test_a_supervised_run_that_was_stopped_as_a_whole_goes_on(tmp_path):
  limits = ("--deadlines.silence", "5", "--deadlines.step", "5", "--deadlines.input", "5")
  process = runs.start(tmp_path, *LONG, *limits)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") > 5)
  stop_and_go_on(process, 8.0)
  code, err = runs.finish(process)
  assert code == Exit.DONE and "restart" not in err, err


def test_what_is_refused_is_refused_once(tmp_path):
  code, err = runs.finish(runs.start(tmp_path, "--supervise", "--batch", "0"))
  assert code == Exit.REFUSED and err.count("batch must be at least 1") == 1
  code, err = runs.finish(runs.start(tmp_path, "--supervise", "--restarts.limit", "many"))
  assert code == Exit.REFUSED and "--restarts.limit must be" in err


def test_a_child_does_not_outlive_its_supervisor(tmp_path):
  process = runs.start(tmp_path, *LONG, "--steps", "100000")
  runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") > 3)
  child = child_of(process)
  process.kill()
  process.communicate()  # Whose pipes the child holds as long as it lives.
  until = time.monotonic() + 10
  while os.path.exists(f"/proc/{child}") and time.monotonic() < until:
    time.sleep(0.05)
  assert not os.path.exists(f"/proc/{child}")


@pytest.mark.slow
def test_a_process_that_holds_pythons_lock_is_ended_with_its_stacks(tmp_path):
  limits = ("--restarts.silence", "4", "--restarts.limit", "0")
  process = runs.start(tmp_path, *LONG, *limits, file="tests/troubled.py", TROUBLE="hold 0 160")
  code, err = runs.finish(process)
  assert code == Exit.DEADLINE and "Aborted" in err and "in trouble\n" in err, err


@pytest.mark.slow
def test_a_stopped_process_of_a_supervised_job_is_ended_and_all_go_on_together(tmp_path):
  arguments = (*LONG, "--steps", "400", "--checkpoints.every", "20", "--evaluation.every", "0")
  arguments += ("--deadlines.step", "6", "--restarts.silence", "20", "--logging.every", "1")
  both = [runs.start(tmp_path, *arguments, **each) for each in runs.joined(2)]
  runs.wait_until(both[0], lambda: runs.lines(tmp_path / "metrics.jsonl") > 45)
  os.kill(child_of(both[1]), signal.SIGSTOP)
  ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.DONE] * 2, ended
  (hang,), (restart, *_) = runs.events(tmp_path, "hang"), runs.events(tmp_path, "restart")
  assert hang["missing"] == [1] and restart["code"] == Exit.DEADLINE
  assert "no sign of life for 20 s" in ended[1][1]
  steps = [row["step"] for row in runs.read(tmp_path, "metrics.jsonl") if row["kind"] == "train"]
  assert steps == list(range(1, 401))
