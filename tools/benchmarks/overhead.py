"""What the loop costs: bigtrain's tokens a second beside those of the same model in plain jax.

  uv run python tools/benchmarks/overhead.py [--batch 8] [--steps 20] [--blocks 20]

A is `bigtrain.train` as it is, with its data, records, TensorBoard files and signals; nothing is
evaluated or saved while the clock runs. B is plain_decoder.py on batches that are on the device
already, with nothing around its step. Blocks of steps alternate, A B A B ..., in one process: noise
of the machine meets both. A block ends when its last step is done. The overhead is the median over
pairs of neighbouring blocks; every spread is that of the quartiles.

"CPU" is the time of all threads of the process, which other processes disturb less; on CPU devices
the model is part of it. "host" is the CPU time of A's main thread outside the compiled call: what
it computes, not what it waits for.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import plain_decoder
import tyro
from rich.console import Console
from rich.table import Table

import bigtrain
from bigtrain.experiment import Experiment
from bigtrain.load import load
from bigtrain.parts import Part
from bigtrain.program import Program

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"
READY = 4  # Batches that B goes through over and over.


@dataclasses.dataclass
class Settings:
  """Compares the training loop with the same model in plain jax."""

  batch: int = 8  # Rows of 128 tokens; 8 make steps of about 50 ms on two CPU cores.
  steps: int = 20  # In a block.
  blocks: int = 20  # Of each kind.
  unroll: int = 4  # Layers in one iteration of bigtrain's loop over layers; 4 are all, as in B.


class Counted:
  """A compiled step that counts the CPU seconds that its callers spend in it."""

  seconds = 0.0

  def __init__(self, compiled):
    self.compiled = compiled

  def __call__(self, state, batch):
    started = time.thread_time()
    result = self.compiled(state, batch)
    Counted.seconds += time.thread_time() - started
    return result


def now() -> np.ndarray:
  """Seconds so far: wall, CPU of all threads, CPU of this thread outside the compiled step."""
  return np.array([time.perf_counter(), time.process_time(), time.thread_time() - Counted.seconds])


class Alternate(Part):
  """Runs a block of B after each block of A, and leaves after the last."""

  def __init__(self, c: Settings):
    self.c = c
    self.a: list[np.ndarray] = []  # What a block took, as in `now`.
    self.b: list[np.ndarray] = []

  def start(self, run: Any, step: int) -> None:
    super().start(run, step)
    self.plain_step = plain_decoder.make_step(run.experiment)
    self.plain: Any = plain_decoder.start(plain_decoder.parameters(run.state.model))
    batches = (run.data.batch(i * self.c.batch, self.c.batch) for i in range(READY))
    self.batches = [jax.device_put(batch) for batch in batches]
    self._plain_block()
    self.since = now()

  def after_step(self, step: int, metrics) -> None:
    if step % self.c.steps:
      return
    jax.block_until_ready(metrics)
    self.a.append(now() - self.since)
    since = now()
    self._plain_block()
    self.b.append(now() - since)
    self.run.left = len(self.a) == 1 + self.c.blocks
    self.since = now()

  def _plain_block(self) -> None:
    for i in range(self.c.steps):
      self.plain, loss = self.plain_step(self.plain, self.batches[i % READY])
    jax.block_until_ready(loss)

  def seconds(self) -> tuple[np.ndarray, np.ndarray]:
    """Seconds a step of A and of B, (blocks, 3), without the first block, where A compiles."""
    return np.array(self.a[1:]) / self.c.steps, np.array(self.b[1:]) / self.c.steps


def experiment(c: Settings) -> Experiment:
  """The quickstart with that batch, and without evaluation and checkpoints."""
  e, _ = load(str(QUICKSTART))
  e.batch, e.steps = c.batch, (c.blocks + 2) * c.steps
  e.evaluation.every = e.checkpoints.every = e.steps
  model: Any = e.model
  model.unroll = c.unroll
  return e


def shown(values, scale: float = 1.0, digits: int = 1) -> str:
  """The median, and the quartiles after it."""
  low, median, high = scale * np.percentile(values, (25, 50, 75))
  return f"{median:,.{digits}f}  ({low:,.{digits}f} to {high:,.{digits}f})"


def main(c: Settings) -> None:
  part, e = Alternate(c), experiment(c)
  compile_step = Program.compile_step
  compiled = lambda *args, **kwargs: Counted(compile_step(*args, **kwargs))
  counted = mock.patch.object(Program, "compile_step", compiled)
  with tempfile.TemporaryDirectory() as directory, counted:
    bigtrain.train(e, directory, quiet=True, parts=[part])
  a, b = part.seconds()
  tokens = c.batch * (e.data.row_length() or 0)
  table = Table(title=f"steps of {tokens} tokens, {c.blocks} blocks of {c.steps} each")
  for column in ("", "ms a step", "CPU ms a step", "tokens/s"):
    table.add_column(column, justify="right", no_wrap=True)
  for name, seconds in (("A bigtrain", a), ("B plain jax", b)):
    wall, cpu, _ = seconds.T
    table.add_row(name, shown(wall, 1e3), shown(cpu, 1e3), shown(tokens / wall, digits=0))
  more = (a / b - 1).T
  table.add_row("overhead, %", shown(more[0], 100), shown(more[1], 100), "limit 3% of a step")
  table.add_row("host of A, us", "", shown(a[:, 2], 1e6, 0), "limit 1,000")
  console = Console()
  console.width = max(console.width, 110)
  console.print(table)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
