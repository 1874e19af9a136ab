"""ssh and gcloud in place of the real ones: they check what they are given, and run it here."""

import os
import subprocess
import sys
from pathlib import Path

from tests import runs

SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
[ "$1" = -- ] || exit 255
echo "$2" >> "$STAND_INS/reached"
exec sh -c "$3"
"""
# TPU VMs tell jax of each other through a server of metadata, for which these variables stand here.
GCLOUD = """#!/bin/bash
[ -z "$STAND_INS_LOGGED_OUT" ] || { echo "You do not have an active account" >&2; exit 1; }
[ "$*" != "compute tpus tpu-vm describe pod --zone us-east5-a --quiet" ] || exit 0
[ "$1 $2 $3 $4" = "compute tpus tpu-vm ssh" ] || exit 2
node=$5; shift 5
while [ $# -gt 0 ]; do
  case $1 in
    --zone) zone=$2; shift ;;
    --worker) worker=$2; shift ;;
    --command) command=$2; shift ;;
    --quiet) ;;
    *) exit 2 ;;
  esac
  shift
done
echo "$node $zone $worker" >> "$STAND_INS/reached"
export BIGTRAIN_COORDINATOR=127.0.0.1:$STAND_INS_PORT BIGTRAIN_PROCESSES=2 BIGTRAIN_PROCESS=$worker
exec sh -c "$command"
"""


def install(folder: Path, environment) -> None:
  """Puts both on the PATH."""
  for name, text in {"ssh": SSH, "gcloud": GCLOUD}.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  environment.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
  environment.setenv("STAND_INS", str(folder))


def launch(run_dir: Path, *arguments: str, train: tuple[str, ...] = ()) -> subprocess.Popen:
  """`bigtrain launch` of the run in tests/runs.py, each host with one CPU device."""
  command = [sys.executable, "-m", "bigtrain.cli", "launch", "tests/runs.py"]
  fixed = ["--dir", str(run_dir), "--folder", str(runs.ROOT), "--grace", "10"]
  fixed += ["--command", f"{sys.executable} -m bigtrain.cli"]
  fixed += ["--environment", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1", "A=it's; $(false) `x`"]
  fixed += ["BIGTRAIN_DEVICES=cpu 2"]  # Whatever chips are named.
  return subprocess.Popen(
    [*command, *fixed, *arguments, "--", "--quiet", *train],
    cwd=runs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def has_saved(run_dir: Path) -> bool:
  """Whether there is something to go on from, and more was done since."""
  folders = [path.name for path in (run_dir / "checkpoints").glob("*")]
  steps = [int(name) for name in folders if name.isdecimal()]
  return bool(steps) and runs.lines(run_dir / "metrics.jsonl") > 1.2 * min(steps)


def process_of(run_dir: Path, number: int) -> int:
  """The id of the Python process that is so-and-so many of a run."""
  for path in Path("/proc").glob("[0-9]*"):
    try:
      words = (path / "cmdline").read_bytes().split(b"\0")
      variables = (path / "environ").read_bytes().split(b"\0")
    except OSError:
      continue
    numbers = {f"BIGTRAIN_PROCESS={number}".encode(), f"SLURM_PROCID={number}".encode()}
    own = b"train" in words and str(run_dir).encode() in words and numbers & set(variables)
    if own and b"python" in os.path.basename(words[0]):
      return int(path.name)
  raise AssertionError(f"process {number} of {run_dir} does not run")
