"""SLURM for real: a controller and two nodes on this machine (tools/slurm/cluster.sh).

Run with `pytest -m slurm`, as root, where slurmctld, slurmd, slurm-client and munge are installed.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bigtrain.exit_codes import Exit
from tests import runs
from tests.launch import stand_ins

pytestmark = [
  pytest.mark.slow,
  pytest.mark.slurm,
  pytest.mark.skipif(shutil.which("slurmctld") is None, reason="SLURM is not installed"),
]
CLUSTER = runs.ROOT / "tools" / "slurm" / "cluster.sh"
STEPS = ("--steps", "300", "--checkpoints.every", "50")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory, prepared):
  folder = tmp_path_factory.mktemp("cluster")
  with pytest.MonkeyPatch.context() as environment:
    subprocess.run([CLUSTER, "start", folder], check=True, stdout=subprocess.PIPE)
    environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
      yield folder
    finally:
      subprocess.run([CLUSTER, "stop", folder], check=True)


def submit(run_dir: Path, *arguments: str, train=STEPS) -> str:
  """The number of a job of two nodes that was submitted."""
  out = run_dir.parent / "logs of 100%"
  where = ["--to", "slurm", "--hosts", "2", "--out", str(out), "--no_plan"]
  process = stand_ins.launch(run_dir, *where, *arguments, train=train)
  told, err = process.communicate(timeout=300)
  assert process.returncode == Exit.DONE, (told, err)
  return re.findall(r"Submitted batch job (\d+)", told)[0]


def shown(job: str) -> dict[str, str]:
  """What SLURM says of a job, by field."""
  out = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
  return dict(re.findall(r"(\w+)=(.*?) *(?=\s\w+=|\n|$)", out))


def log(run_dir: Path) -> str:
  return "\n".join(path.read_text() for path in (run_dir.parent / "logs of 100%").glob("*.log"))


def wait(job: str, state: str, seconds: float = 600) -> None:
  until = time.monotonic() + seconds
  while shown(job).get("JobState") != state:
    assert time.monotonic() < until, shown(job)
    time.sleep(0.2)


def wait_for_work(run_dir: Path, seconds: float = 300) -> None:
  until = time.monotonic() + seconds
  while not stand_ins.has_saved(run_dir):
    assert time.monotonic() < until, log(run_dir)
    time.sleep(0.01)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, cluster):
  """The rows of a run that nothing disturbed."""
  run_dir = tmp_path_factory.mktemp("quiet") / "it's a run"
  comment = 'it\'s "a" $(false) `test`'
  job = submit(run_dir, "--engine.options", f"comment={comment}", "--engine.partition", "all")
  wait(job, "COMPLETED")
  assert shown(job)["Comment"] == comment and shown(job)["Restarts"] == "0"
  assert [e["processes"] for e in runs.events(run_dir, "start")] == [2]
  return runs.values(run_dir)


def test_a_job_whose_node_dies_is_requeued_and_ends_with_the_same_losses(tmp_path, quiet, cluster):
  run_dir = tmp_path / "run"
  job = submit(run_dir)
  wait_for_work(run_dir)
  daemon = int((cluster / "slurmd-127.0.0.2.pid").read_text())
  process = stand_ins.process_of(run_dir, 1)
  steps = subprocess.run(["pgrep", "-f", r"slurmstepd: \["], capture_output=True, text=True)
  on_node = [pid for pid in map(int, steps.stdout.split()) if _is_above(pid, process)]
  for pid in (daemon, *on_node, process):
    os.kill(pid, signal.SIGKILL)
  wait(job, "PENDING")
  subprocess.run([CLUSTER, "node", cluster, "2"], check=True)
  wait(job, "COMPLETED")
  assert shown(job)["Restarts"] == "1"
  assert len(runs.events(run_dir, "start")) == 2 and runs.events(run_dir, "restore")
  assert runs.values(run_dir) == quiet


def test_a_job_that_is_told_to_leave_saves_and_requeues_itself(tmp_path, quiet):
  run_dir = tmp_path / "run"
  job = submit(run_dir)
  wait_for_work(run_dir)
  subprocess.run(["scancel", "--signal=TERM", job], check=True)  # As before its time is up.
  wait(job, "PENDING")
  wait(job, "COMPLETED")
  assert "ended with code 3; requeued" in log(run_dir)
  assert len(runs.events(run_dir, "signal")) == 1 and shown(job)["Restarts"] == "1"
  assert runs.values(run_dir) == quiet


def test_a_cancelled_job_saves_and_stays_cancelled(tmp_path):
  run_dir = tmp_path / "run"
  job = submit(run_dir, train=("--steps", "100000", "--checkpoints.every", "50"))
  wait_for_work(run_dir)
  subprocess.run(["scancel", job], check=True)
  wait(job, "CANCELLED")
  time.sleep(10)
  assert shown(job)["JobState"] == "CANCELLED" and runs.events(run_dir, "signal")


def test_a_refused_job_is_not_requeued(tmp_path):
  run_dir = tmp_path / "run"
  job = submit(run_dir, train=("--data.source.pattern", "/nowhere/*.txt"))
  wait(job, "FAILED")
  assert shown(job)["ExitCode"] == "2:0" and shown(job)["Restarts"] == "0"
  assert "/nowhere/*.txt" in log(run_dir)


def test_a_job_requeues_itself_only_so_often(tmp_path):
  run_dir = tmp_path / "run"
  job = submit(run_dir, "--restarts", "1", "--setup", "exit 1")
  wait(job, "FAILED")
  assert shown(job)["Restarts"] == "1" and "was restarted 1 times in a row" in log(run_dir)


def test_a_refusal_of_one_host_outweighs_the_death_of_another(tmp_path):
  run_dir = tmp_path / "run"
  job = submit(run_dir, "--setup", '[ "$SLURM_PROCID" = 0 ] || kill -KILL $$; exit 2')
  wait(job, "FAILED")
  assert shown(job)["Restarts"] == "0" and "the code of a host was final" in log(run_dir)


def _is_above(pid: int, child: int) -> bool:
  """Whether one process is an ancestor of another."""
  while child > 1:
    child = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    if child == pid:
      return True
  return False
