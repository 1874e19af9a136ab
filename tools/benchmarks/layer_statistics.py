"""What the statistics of every layer cost: steps with and without them, in turns.

uv run python tools/benchmarks/layer_statistics.py [--batch 8] [--blocks 20]
"""

import dataclasses
import time

import jax
import numpy as np
import tyro
from overhead import experiment, shown
from rich.console import Console
from rich.table import Table

from bigtrain.experiment import Logging
from bigtrain.program import Program


@dataclasses.dataclass
class Settings:
  """Compares the quickstart's step with the one that gathers statistics."""

  batch: int = 8  # Rows of 128 tokens.
  steps: int = 10  # In a block.
  blocks: int = 20  # Of each kind.
  unroll: int = 4  # Layers in one iteration of the loop over layers.


def main(c: Settings) -> None:
  e = experiment(c)
  data, program = e.data.make(e.seed), Program(e, None)
  batch = jax.device_put(data.batch(0, c.batch))
  leaves = jax.tree.leaves(program.compile_init()(jax.random.key(0)))
  seconds, compiling = {}, {}
  steps = {}
  for statistics in (False, True):
    started = time.perf_counter()
    steps[statistics] = program.compile_step(data.spec(c.batch), statistics=statistics)
    compiling[statistics], seconds[statistics] = time.perf_counter() - started, []
  for _ in range(c.blocks + 1):
    for statistics, step in steps.items():
      started = time.perf_counter()
      for _ in range(c.steps):
        leaves, metrics = step(leaves, batch)
      jax.block_until_ready(metrics)
      seconds[statistics].append((time.perf_counter() - started) / c.steps)
  plain, more = (np.array(seconds[s][1:]) for s in (False, True))
  every = Logging().layers_every
  table = Table(title=f"steps of {c.batch} rows, {c.blocks} blocks of {c.steps} each")
  for column in ("", "ms a step", "seconds to compile"):
    table.add_column(column, justify="right", no_wrap=True)
  table.add_row("without", shown(plain, 1e3), f"{compiling[False]:.1f}")
  table.add_row("with statistics", shown(more, 1e3), f"{compiling[True]:.1f}")
  table.add_row("added, %", shown(more / plain - 1, 100), "")
  table.add_row(f"one step in {every}, %", shown((more / plain - 1) / every, 100, 2), "limit 2%")
  Console().print(table)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
