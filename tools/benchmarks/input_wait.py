"""How long a step waits for its batch: the real feed beside the real step.

  uv run python tools/benchmarks/input_wait.py [--steps 200] [--experiment experiments/gpt2.py]

The training loop runs as it is, without evaluation and checkpoints, and each step's wait is noted:
the time from asking for the batch to having it on the device. The first steps, which find the
threads of the feed at their start, are left out. "feed alone" is how fast batches come when nothing
else is done, "needed" how fast the step takes them: the first must be higher.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import bigtrain
from bigtrain.data.feed import Feed, Sizes
from bigtrain.experiment import Experiment
from bigtrain.load import load
from bigtrain.parts import Part

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"
FIRST = 10  # Steps left out.


@dataclasses.dataclass
class Settings:
  """Measures the input wait of each step."""

  experiment: str = str(QUICKSTART)
  steps: int = 100


class Waits(Part):
  """Notes when each step was dispatched, and how long it had waited; leaves at the end."""

  def __init__(self, steps: int):
    self.steps = steps
    self.waits: list[float] = []
    self.times: list[float] = []

  def after_step(self, step: int, metrics) -> None:
    jax.block_until_ready(metrics)
    self.waits.append(self.run.feed.wait)
    self.times.append(time.perf_counter())
    self.run.left = len(self.waits) == FIRST + self.steps


def feed_alone(e: Experiment, steps: int) -> float:
  """Batches a second of the feed on one device, when nothing else is done."""
  feed = Feed(e.data.make(e.seed), Sizes(e.batch), None, step=0, example=0, stop=FIRST + steps)
  with feed:
    for _ in range(FIRST):
      next(feed)
    started = time.perf_counter()
    for _ in range(steps):
      jax.block_until_ready(next(feed))
    return steps / (time.perf_counter() - started)


def main(c: Settings) -> None:
  e, _ = load(c.experiment)
  e.steps, e.batch_stages = FIRST + c.steps + 1, ()
  e.evaluation.every = e.checkpoints.every = e.steps
  part = Waits(c.steps)
  with tempfile.TemporaryDirectory() as directory:
    bigtrain.train(e, directory, quiet=True, parts=[part])
  waits, seconds = 1e3 * np.array(part.waits[FIRST:]), np.diff(part.times[FIRST - 1 :])
  table = Table(title=f"{c.steps} steps of {e.batch} rows of {e.data.row_length()} tokens")
  for column in ("", "median", "p99", "highest"):
    table.add_column(column, justify="right", no_wrap=True)
  for name, values in (("wait, ms", waits), ("step, ms", 1e3 * seconds)):
    table.add_row(name, *(f"{np.percentile(values, p):.3f}" for p in (50, 99, 100)))
  table.add_row("wait, % of all time", f"{waits.sum() / seconds.sum() / 10:.3f}")
  table.add_row("needed, batches/s", f"{1 / np.median(seconds):.1f}")
  table.add_row("feed alone, batches/s", f"{feed_alone(e, c.steps):.1f}")
  Console().print(table)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
