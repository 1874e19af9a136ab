"""Time to the first step: from the start of the command to the first row of metrics.jsonl.

  uv run python tools/benchmarks/first_step.py [--repeats 3] [--experiment experiments/llama3.py]

Each run is a process of its own, `bigtrain train EXPERIMENT`, killed after its first step. "cold"
has empty caches: the data is prepared (and a tokenizer trained), everything compiled. "warm" has
what the cold run left. The phases come from the run's events.jsonl.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
PHASES = ("imports and config", "data", "initialise", "compile", "first step")


@dataclasses.dataclass
class Settings:
  """Measures the time from the command's start to the first completed step."""

  experiment: str = str(ROOT / "experiments" / "quickstart.py")
  repeats: int = 3  # Of each kind.
  patience: float = 600.0  # Seconds until a run is given up.


def first_step(c: Settings, caches: Path) -> dict[str, float]:
  """Seconds of each phase of one run."""
  with tempfile.TemporaryDirectory() as directory:
    run_dir = Path(directory) / "run"
    flags = ["--dir", str(run_dir), "--quiet", "--logging.every", "1"]
    command = [sys.executable, "-m", "bigtrain.cli", "train", c.experiment, *flags]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"BIGTRAIN_CACHE": str(caches)}
    started = time.time()
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
      ended = wait_for_row(run_dir / "metrics.jsonl", process, started + c.patience)
    finally:
      process.kill()
      process.wait()
    lines = (run_dir / "events.jsonl").read_text().splitlines()
  events = {event["event"]: event for event in map(json.loads, lines)}
  seconds = {name: events[name]["seconds"] for name in PHASES[1:-1]}
  seconds[PHASES[0]] = events["start"]["time"] - started
  return seconds | {PHASES[-1]: ended - started - sum(seconds.values())}


def wait_for_row(path: Path, process: subprocess.Popen, until: float) -> float:
  """The time at which the file had its first line."""
  while not (path.exists() and path.read_bytes().endswith(b"\n")):
    if process.poll() is not None:
      raise SystemExit(f"the run ended with code {process.returncode} before its first step")
    if time.time() > until:
      raise SystemExit("the run took no step in time; give it more --patience")
    time.sleep(0.02)
  return time.time()


def main(c: Settings) -> None:
  runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
  for _ in range(c.repeats):
    with tempfile.TemporaryDirectory() as caches:
      for kind in runs:
        runs[kind].append(first_step(c, Path(caches)))
  table = Table(title=f"seconds to the first step of {Path(c.experiment).name}")
  for column in ("phase", *(f"{kind}, median of {c.repeats}" for kind in runs)):
    table.add_column(column, justify="right", no_wrap=True)
  for phase in PHASES:
    table.add_row(phase, *(f"{np.median([r[phase] for r in of]):.2f}" for of in runs.values()))
  totals = [[sum(run.values()) for run in of] for of in runs.values()]
  spread = lambda t: f"{np.median(t):.2f}  ({min(t):.2f} to {max(t):.2f})"
  table.add_row("in all", *map(spread, totals))
  Console().print(table)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
