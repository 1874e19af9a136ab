"""How long the loop stands still for a checkpoint, by the size of the state.

  uv run python tools/benchmarks/checkpoint_stall.py [--dims 128 512 1024] [--saves 5]

A save copies the state to the host's memory, which the loop waits for, and writes it to disk in the
background, which it does not. "stall" is the first, as the loop sees it; "in the background" the
time from there until all is durable. Where saves come faster than the disk takes them, the loop
waits for that too: "back to back" is the stall of a save that follows another at once.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bigtrain.checkpoint import Store
from bigtrain.experiment import Experiment
from bigtrain.load import load
from bigtrain.program import Program
from bigtrain.run_directory import RunDirectory

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"


@dataclasses.dataclass
class Settings:
  """Measures how long saving a checkpoint stalls the loop."""

  dims: tuple[int, ...] = (128, 512, 1024)  # Widths of the quickstart's model.
  saves: int = 5  # Of each size.


def seconds(e: Experiment, saves: int) -> tuple[float, np.ndarray]:
  """MB of the state, and the seconds of each save, (saves, 3): stall, background, back to back."""
  state = jax.block_until_ready(Program(e, None).compile_init()(jax.random.key(0)))
  times = []
  with tempfile.TemporaryDirectory() as directory:
    path = RunDirectory(directory).checkpoints
    with Store(path, e.checkpoints) as store:
      for step in range(0, 3 * (saves + 1), 3):  # The first are not counted.
        started = time.perf_counter()
        store.save(step + 1, state, e)
        stalled = time.perf_counter()
        store.wait()
        durable = time.perf_counter()
        store.save(step + 2, state, e)
        again = time.perf_counter()
        store.save(step + 3, state, e)
        times.append((stalled - started, durable - stalled, time.perf_counter() - again))
        store.wait()
  return sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6, np.array(times[1:])


def main(c: Settings) -> None:
  table = Table(title=f"seconds of a checkpoint, median of {c.saves} and the longest")
  columns = ("state, MB", "stall", "in the background", "back to back")
  for column in columns:
    table.add_column(column, justify="right", no_wrap=True)
  for dim in c.dims:
    e, _ = load(str(QUICKSTART))
    model: Any = e.model
    model.dim = dim
    megabytes, times = seconds(e, c.saves)
    shown = (f"{np.median(t):.3f}  ({t.max():.3f})" for t in times.T)
    table.add_row(f"{megabytes:,.0f}", *shown)
  Console().print(table)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
