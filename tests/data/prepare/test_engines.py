"""A preparation runs where its engine says: on this machine, a Slurm cluster, a Ray cluster."""

import os
import pathlib
import sys

import pytest

pytest.importorskip("datatrove")

from bigtrain.config import Refused
from bigtrain.data.prepare.engine import Slurm
from bigtrain.data.prepare.run import prepare
from tests.data.prepare.corpus import contents, document, jsonl, recipe

# Slurm's commands, as far as datatrove uses them: a job array runs at once, a task after another.
COMMANDS = {
  "sbatch": """
echo "$@" >> "$SLURM_STAND_IN/sbatch.log"
script="${@: -1}"
cat "$script" >> "$SLURM_STAND_IN/scripts.log"
[ -e "$SLURM_STAND_IN/down" ] && { echo "sbatch: error: no controller" >&2; exit 1; }
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=node1 RUN_OFFSET=0 bash "$script" \\
    >> "$SLURM_STAND_IN/jobs.log" 2>&1
done
echo "Submitted batch job $((100 + $(wc -l < "$SLURM_STAND_IN/sbatch.log")))"
""",
  "srun": 'while [ "${1#-}" != "$1" ] || [ "$1" -eq "$1" ] 2>/dev/null; do shift; done; exec "$@"',
  "scontrol": "echo node1",
  "squeue": 'echo "$@" >> "$SLURM_STAND_IN/squeue.log"; cat "$SLURM_STAND_IN/queue" 2>/dev/null',
  "merge_stats": "true",  # datatrove's own, which only adds up its logs.
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """A folder with stand-ins for Slurm's commands, first on the path, and what they were given."""
  folder = tmp_path / "slurm"
  folder.mkdir()
  for name, script in COMMANDS.items():
    (folder / name).write_text(f"#!/bin/bash\n{script}")
    (folder / name).chmod(0o755)
  there = os.pathsep.join([str(folder), str(pathlib.Path(sys.executable).parent)])
  monkeypatch.setenv("PATH", f"{there}{os.pathsep}{os.environ['PATH']}")
  monkeypatch.setenv("SLURM_STAND_IN", str(folder))
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent.parent.parent.parent))
  return folder


def test_slurm_runs_the_stages_in_order_and_gives_the_same_bytes(slurm, tmp_path, capsys):
  jsonl(tmp_path / "in" / "a.jsonl", [document(i) for i in range(20)])
  engine = Slurm(partition="cpu", time="1:00:00", cpus=2, options=(("account", "text"),))
  made = prepare(recipe(tmp_path / "in", near=None, tasks=1, engine=engine), tmp_path / "out")
  assert made is not None, (slurm / "jobs.log").read_text()
  prepare(recipe(tmp_path / "in", near=None, tasks=1), tmp_path / "here")
  assert contents(tmp_path / "out") == contents(tmp_path / "here")
  script = (slurm / "scripts.log").read_text()
  for line in (
    "partition=cpu",
    "time=1:00:00",
    "cpus-per-task=2",
    "mem-per-cpu=4G",
    "account=text",
  ):
    assert f"#SBATCH --{line}" in script
  assert "qos" not in script and "#SBATCH --kill-on-invalid-dep=yes" in script
  jobs = [line for line in (slurm / "sbatch.log").read_text().splitlines() if "--export" in line]
  assert len(jobs) == 4  # clean, exact, pack, report.
  assert [("--dependency=afterok:" in job) for job in jobs] == [False, True, True, True]


def test_what_is_in_slurms_queue_is_not_queued_again(slurm, tmp_path, capsys):
  jsonl(tmp_path / "in" / "a.jsonl", ["one two three"])
  (slurm / "down").touch()
  r = recipe(tmp_path / "in", near=None, exact="keep", tasks=1, engine=Slurm(partition="cpu"))
  with pytest.raises(Refused, match="Slurm's sbatch did not take the job"):
    prepare(r, tmp_path / "out")
  (tmp_path / "out" / "work" / "slurm.json").write_text('["101", "102"]')
  (slurm / "queue").write_text("101 PENDING\n")
  calls = (slurm / "sbatch.log").read_text()
  assert prepare(r, tmp_path / "out") is None
  assert "queued; the same command tells how far it is (0/3)" in capsys.readouterr().err
  assert (slurm / "sbatch.log").read_text() == calls
  assert (slurm / "squeue.log").read_text() == "--noheader --jobs=101,102\n"
  (slurm / "queue").unlink()
  with pytest.raises(Refused, match="Slurm's sbatch did not take the job"):
    prepare(r, tmp_path / "out")


def test_without_slurm_the_engine_is_refused(tmp_path, monkeypatch):
  jsonl(tmp_path / "in" / "a.jsonl", ["one two three"])
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(Refused, match=r"Slurm's sbatch did not take the job: .*sbatch"):
    prepare(recipe(tmp_path / "in", engine=Slurm(partition="cpu")), tmp_path / "out")


def test_ray_gives_the_same_bytes(tmp_path):
  pytest.importorskip("ray")
  from bigtrain.data.prepare.engine import Ray

  jsonl(tmp_path / "in" / "a.jsonl", [document(i) for i in range(20)])
  assert prepare(recipe(tmp_path / "in", engine=Ray(memory_gb=0.2)), tmp_path / "out") is not None
  prepare(recipe(tmp_path / "in"), tmp_path / "here")
  assert contents(tmp_path / "out") == contents(tmp_path / "here")
