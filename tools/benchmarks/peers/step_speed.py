"""bigtrain's compiled step beside that of the same model in PyTorch, on CPU, taking turns.

  python3.11 -m venv torch-venv && torch-venv/bin/pip install torch==2.13.0 numpy
  uv run python tools/benchmarks/peers/step_speed.py --torch torch-venv/bin/python

A decoder of 6 layers, 384 wide, with 6 heads, on 16 rows of 256 bytes: forward, loss, backward,
clipping and AdamW. Every peer is a process of its own that waits while the others step, and each
round gives every peer a block of steps: noise of the machine meets all. What is compared is the
median over rounds of the ratio within a round, its quartiles beside it.

"CPU" is the time of all threads of a process, which what else the machine does disturbs less.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class Settings:
  """Compares the training step with PyTorch's."""

  torch: str  # A Python that has torch.
  bigtrain: tuple[str, ...] = (sys.executable,)  # Pythons that have bigtrain.
  kernel: tuple[str, ...] = ("auto",)  # Of attention: a peer for each Python and kernel.
  dtype: str = "float32"  # Of activations; or bfloat16, in PyTorch by autocast.
  rounds: int = 9
  steps: int = 3  # Of every peer in a round.
  layers: int = 6
  dim: int = 384
  heads: int = 6
  length: int = 256  # Tokens of a row.
  rows: int = 16
  vocab: int = 256  # Bytes.


class Peer:
  """A process that takes steps when it is asked to."""

  def __init__(self, name: str, python: str, script: str, settings: dict):
    self.name = name
    command = [python, str(HERE / script)]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[2]
    )
    self._say(json.dumps(settings))
    self.steps(1)  # Compiles.
    self.times: list[tuple[float, float]] = []

  def steps(self, n: int) -> tuple[float, float, float]:
    """Seconds and CPU seconds a step, and the loss after them."""
    self._say(str(n))
    line = self.process.stdout.readline() if self.process.stdout else ""
    if not line:
      raise SystemExit(f"{self.name} ended: {self.process.wait()}")
    wall, cpu, loss = json.loads(line)
    return wall / n, cpu / n, loss

  def _say(self, line: str) -> None:
    assert self.process.stdin is not None
    self.process.stdin.write(line + "\n")
    self.process.stdin.flush()


def peers(c: Settings) -> list[Peer]:
  """PyTorch first."""
  settings = dataclasses.asdict(c)
  found = [Peer("PyTorch, compiled", c.torch, "peer_torch.py", settings)]
  for python in c.bigtrain:
    version = "import jax; print(jax.__version__)"
    jax = subprocess.run([python, "-c", version], capture_output=True, text=True, check=True).stdout
    for kernel in c.kernel:
      name = f"bigtrain, jax {jax.strip()}, {kernel}"
      found.append(Peer(name, python, "peer_bigtrain.py", settings | {"kernel": kernel}))
  return found


def shown(values, scale: float = 1.0, digits: int = 0) -> str:
  """The median, and the quartiles after it."""
  low, median, high = scale * np.percentile(values, (25, 50, 75))
  return f"{median:,.{digits}f}  ({low:,.{digits}f} to {high:,.{digits}f})"


def main(c: Settings) -> None:
  them = peers(c)
  losses = {}
  for i in range(c.rounds):
    for peer in them:
      wall, cpu, losses[peer.name] = peer.steps(c.steps)
      peer.times.append((wall, cpu))
    cpu = ", ".join(f"{1e3 * peer.times[-1][1]:,.0f}" for peer in them)
    print(f"round {i + 1} of {c.rounds}: {cpu} CPU ms a step", flush=True)
  table = Table(
    title=f"{c.dtype}, {c.rounds} rounds of {c.steps} steps of {c.rows * c.length} tokens"
  )
  for column in ("", "ms a step", "CPU ms a step", "speed", "speed by CPU time", "loss"):
    table.add_column(column, justify="right", no_wrap=True)
  base = np.array(them[0].times)
  for peer in them:
    times = np.array(peer.times)
    wall, cpu = (base / times).T
    row = (shown(times[:, 0], 1e3), shown(times[:, 1], 1e3), shown(wall, 1, 2), shown(cpu, 1, 2))
    table.add_row(peer.name, *row, f"{losses[peer.name]:.3f}")
  console = Console()
  console.width = max(console.width, 160)
  console.print(table)
  for peer in them:
    peer.process.kill()


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
