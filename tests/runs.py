"""A run that trains in a second or two: its experiment, as a file for the command line, and ways to
start it as a command of its own. $RUNS_TEXT names the folder of its text, which `prepare` fills."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from bigtrain import Checkpoints, Evaluation, Experiment, Logging
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine
from tests.bigram import Bigram

ROOT = Path(__file__).parent.parent
SPEED = (
  "time", "goodput", "step_seconds", "input_wait_seconds", "tokens_per_second",
  "examples_per_second", "model_flops_per_second",
)  # fmt: skip


def base() -> Experiment:
  """Dropout and averaged weights, so that keys and the average decide the future too."""
  return Experiment(
    model=Bigram(),
    data=TextData(source=Files(pattern=os.environ["RUNS_TEXT"], validation=0.1), seq=64),
    objective=CausalLM(loss_chunk=None),
    optimizer=AdamW(lr=3e-2, schedule=Cosine(warmup=5), average=0.9),
    steps=20,
    batch=8,
    evaluation=Evaluation(every=10, batch=8),
    checkpoints=Checkpoints(every=5),
    logging=Logging(every=1, tensorboard=False),
  )


def prepare(folder: Path, environment=None) -> None:
  """Forty short documents, the same anywhere, and a cache; the environment is told of both.

  Args:
    folder: where both are made.
    environment: something with `setenv`; None for this process's own.
  """
  (folder / "text").mkdir()
  rng = random.Random(0)
  words = ["sense", "and", "sensibility", "pride", "prejudice", "emma", "persuasion", "it", "was"]
  for i in range(40):
    text = " ".join(rng.choice(words) for _ in range(rng.randrange(20, 80)))
    (folder / "text" / f"{i:02}.txt").write_text(text)
  for name, value in (("RUNS_TEXT", "text"), ("BIGTRAIN_CACHE", "cache")):
    tell = os.environ.__setitem__ if environment is None else environment.setenv
    tell(name, str(folder / value))


def start(
  run_dir: Path, *arguments: str, file: str = "tests/runs.py", **environment: str
) -> subprocess.Popen:
  """`bigtrain train` of `base`, on one CPU device unless the environment says otherwise."""
  command = [sys.executable, "-m", "bigtrain.cli", "train", file, "--dir", str(run_dir)]
  return subprocess.Popen(
    [*command, "--quiet", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def joined(processes: int) -> list[dict[str, str]]:
  """The environment of each of so many processes with eight devices together."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  shared = {
    "BIGTRAIN_COORDINATOR": coordinator,
    "BIGTRAIN_PROCESSES": str(processes),
    "JAX_NUM_CPU_DEVICES": str(8 // processes),
  }
  return [shared | {"BIGTRAIN_PROCESS": str(i)} for i in range(processes)]


def finish(process: subprocess.Popen) -> tuple[int, str]:
  """The exit code of a command, and what it wrote on standard error."""
  _, err = process.communicate(timeout=300)
  return process.returncode, err


def wait_until(process: subprocess.Popen, condition) -> None:
  """Returns as soon as the condition holds; fails if the process ends before that."""
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.001)


def lines(path: Path) -> int:
  return path.read_bytes().count(b"\n") if path.exists() else 0


def read(run_dir: Path, name: str) -> list[dict]:
  return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def values(run_dir: Path) -> list[str]:
  """The rows of metrics.jsonl in order, as written, but for how fast it was."""
  rows = read(run_dir, "metrics.jsonl")
  return [json.dumps({k: v for k, v in row.items() if k not in SPEED}) for row in rows]


def keys(run_dir: Path) -> list[tuple[int, str]]:
  return [(row["step"], row["kind"]) for row in read(run_dir, "metrics.jsonl")]


def events(run_dir: Path, name: str) -> list[dict]:
  return [row for row in read(run_dir, "events.jsonl") if row["event"] == name]


def saved(run_dir: Path) -> list[int]:
  """The steps that have a checkpoint; fails if something else lies beside them."""
  return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
