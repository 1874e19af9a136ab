"""What ssh and gcloud are told really runs: by stand-ins for both, on the loopback."""

import os
import signal
import time

import pytest

from bigtrain.exit_codes import Exit
from bigtrain.launch import held
from bigtrain.launch.job import Command
from tests import runs
from tests.launch import stand_ins
from tests.test_processes import free_port

SECRET = "correct-horse-battery-staple"
STEPS = ("--steps", "200", "--checkpoints.every", "40")


@pytest.fixture(scope="module", autouse=True)
def reachable(tmp_path_factory, prepared):
  with pytest.MonkeyPatch.context() as environment:
    stand_ins.install(tmp_path_factory.mktemp("bin"), environment)
    environment.setenv("WANDB_API_KEY", SECRET)
    environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yield


def ssh(run_dir, *arguments, train=STEPS):
  hosts = ["--to", "ssh", "--engine.machines", "me@127.0.0.1", "there"]
  return stand_ins.launch(
    run_dir, *hosts, "--engine.port", str(free_port()), *arguments, train=train
  )


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
  """The rows of a run that nothing disturbed."""
  run_dir = tmp_path_factory.mktemp("quiet") / "it's a run"
  compiled = run_dir.parent / "compiled"
  check = f'[ "$WANDB_API_KEY" = {SECRET} ] && [ "$A" = "it\'s; \\$(false) \\`x\\`" ] || exit 9'
  process = ssh(
    run_dir, "--secrets", "WANDB_API_KEY", "--setup", check, "--compiled", str(compiled)
  )
  out, err = process.communicate(timeout=300)
  assert process.returncode == Exit.DONE, (out, err)
  assert "me@127.0.0.1 0, there 0" in err
  assert [e["processes"] for e in runs.events(run_dir, "start")] == [2]
  for path in run_dir.rglob("*"):
    assert path.is_dir() or SECRET.encode() not in path.read_bytes()
  assert SECRET not in out + err
  assert list(compiled.iterdir())  # A restart finds its programs there.
  return runs.values(run_dir)


def test_a_killed_process_on_a_tpu_vm_is_started_again_and_ends_with_the_same_losses(
  tmp_path, quiet, monkeypatch
):
  monkeypatch.setenv("STAND_INS_PORT", str(free_port()))
  run_dir = tmp_path / "run"
  chips = ["--chips", "v5e:2x4", "--hosts", "2", "--no_plan"]
  where = ["--to", "gcloud", "--engine.nodes", "pod", "--engine.zone", "us-east5-a"]
  process = stand_ins.launch(
    run_dir,
    *where,
    *chips,
    "--engine.pause",
    "0.1",
    "--grace",
    "2",
    train=(*STEPS, "--mesh.fsdp", "-1"),
  )
  runs.wait_until(process, lambda: stand_ins.has_saved(run_dir))
  os.kill(stand_ins.process_of(run_dir, 1), signal.SIGKILL)
  out, err = process.communicate(timeout=300)
  assert process.returncode == Exit.DONE, (out, err)
  assert "restart 1 of 100" in err and "pod/1 137" in err
  assert len(runs.events(run_dir, "start")) == 2 and runs.events(run_dir, "restore")
  assert runs.values(run_dir) == quiet


@pytest.mark.slow
def test_a_launcher_that_is_interrupted_lets_its_hosts_save_and_the_same_command_goes_on(
  tmp_path, quiet
):
  process = ssh(tmp_path)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") > 60)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=300)
  assert process.returncode == Exit.LEFT, (out, err)
  assert "left; exit codes: me@127.0.0.1 3, there 3" in err
  assert len(runs.events(tmp_path, "signal")) == 1
  process = ssh(tmp_path)
  out, err = process.communicate(timeout=300)
  assert process.returncode == Exit.DONE, (out, err)
  assert runs.values(tmp_path) == quiet


@pytest.mark.slow
def test_hosts_save_and_leave_when_their_launcher_is_killed(tmp_path):
  process = ssh(tmp_path)
  runs.wait_until(process, lambda: runs.lines(tmp_path / "metrics.jsonl") > 20)
  left = stand_ins.process_of(tmp_path, 0)
  process.kill()
  process.communicate()
  until = time.monotonic() + 60
  while os.path.exists(f"/proc/{left}") and time.monotonic() < until:
    time.sleep(0.1)
  assert runs.events(tmp_path, "left") and not runs.events(tmp_path, "error")
  assert runs.saved(tmp_path)[-1] == runs.keys(tmp_path)[-1][0]


def test_what_is_refused_is_not_started_again(tmp_path):
  process = ssh(tmp_path, train=("--data.source.pattern", "/nowhere/*.txt"))
  out, err = process.communicate(timeout=300)
  assert process.returncode == Exit.REFUSED, (out, err)
  assert "restart" not in err and "[there] bigtrain: " in out


def test_without_a_login_nothing_is_started_and_nothing_again(tmp_path, monkeypatch):
  monkeypatch.setenv("STAND_INS_LOGGED_OUT", "1")
  where = ["--to", "gcloud", "--engine.nodes", "pod", "--engine.zone", "us-east5-a"]
  process = stand_ins.launch(tmp_path, *where, "--chips", "v5e:2x2", "--no_plan")
  _, err = process.communicate(timeout=300)
  assert process.returncode == Exit.REFUSED and "restart" not in err
  assert "describe pod --zone us-east5-a --quiet` ended with 1: You do not have an active" in err


def test_a_host_without_the_command_says_how_it_may_be_called(tmp_path):
  process = ssh(tmp_path, "--command", "no_such_bigtrain")
  out, err = process.communicate(timeout=300)
  assert process.returncode == Exit.REFUSED, (out, err)
  assert "[there] bigtrain: this host has no command no_such_bigtrain on its PATH" in out
  assert "as --command 'uv run bigtrain'" in out and "there 127" in err


@pytest.mark.parametrize(
  "codes, expected",
  [
    ([0, 0], Exit.DONE),
    ([137, 2], Exit.REFUSED),
    ([1, 127], Exit.REFUSED),
    ([134, 4], Exit.CHECK),
    ([3, 3], Exit.LEFT),
    ([3, 5], Exit.DEADLINE),
    ([0, 137], Exit.FAILED),
    ([255, 143], Exit.FAILED),
  ],
)
def test_the_codes_of_all_processes_are_one(codes, expected):
  assert held._verdict(codes) == expected


def test_a_start_that_lasted_is_the_first_of_a_new_row(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(held, "LASTING", 0.3)
  script = f"echo >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) -lt 4 ] || exit 0; sleep 0.5"
  lasts = Command(("bash", "-c", f"{script}; exit 1"), name="here")
  assert held.hold([lasts], restarts=1, grace=1, pause=0.01) == Exit.DONE
  assert capsys.readouterr().err.count("restart 1 of 1") == 3


def test_what_fails_each_time_is_started_so_often_and_no_more(capsys):
  fails = Command(("bash", "-c", "exit 1"), name="here")
  assert held.hold([fails, fails], restarts=2, grace=1, pause=0.01) == Exit.FAILED
  assert capsys.readouterr().err.count("restart ") == 2
