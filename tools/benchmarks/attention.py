"""Attention by kernel on this machine: CPU time and memory of a forward and a backward pass.

  uv run python tools/benchmarks/attention.py [--lengths 256 1024 4096] [--tokens 4096]

Causal, rows of three documents, 6 heads of 64. Kernels take turns, so that noise of the machine
meets all; times are CPU time of all threads, medians with quartiles. Memory is what the compiled
program allocates besides its arguments and results.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bigtrain.kernels.attention import Call, Form, Tokens, attend


@dataclasses.dataclass
class Settings:
  """Measures attention by kernel and length."""

  kernels: tuple[Any, ...] = ("plain", "blockwise")
  lengths: tuple[int, ...] = (256, 1024, 4096)  # Tokens of a row.
  tokens: int = 4096  # In all rows together.
  heads: int = 6
  head_dim: int = 64
  dtype: str = "float32"
  rounds: int = 7


def arguments(c: Settings, length: int):
  """q, k, v, the tokens and the output's cotangent."""
  r, rows = np.random.default_rng(0), max(c.tokens // length, 1)
  normal = lambda *shape: jnp.asarray(r.normal(size=shape), c.dtype)
  of_keys = (rows, length, c.heads, c.head_dim)
  q, dout = (normal(rows, length, c.heads, 1, c.head_dim) for _ in range(2))
  segments = np.int32(np.sort(r.integers(0, 3, (rows, length)), axis=1))
  positions = np.broadcast_to(np.int32(np.arange(length)), segments.shape)
  return q / c.head_dim**0.5, normal(*of_keys), normal(*of_keys), Tokens(positions, segments), dout


def compiled(kernel, args):
  form = Form(causal=True, aligned=True, kernel=kernel)

  def run(q, k, v, tokens, dout):
    out, pull = jax.vjp(lambda *arrays: attend(Call(*arrays, tokens, tokens, form)), q, k, v)
    return out, pull(dout)

  return jax.jit(run).lower(*args).compile()


def main(c: Settings) -> None:
  table = Table(title=f"{c.dtype}, {c.tokens} tokens, {c.heads} heads of {c.head_dim}")
  for column in ("tokens a row", "kernel", "CPU ms", "quartiles", "MB"):
    table.add_column(column, justify="right", no_wrap=True)
  for length in c.lengths:
    args = arguments(c, length)
    programs = {kernel: compiled(kernel, args) for kernel in c.kernels}
    times: dict[str, list[float]] = {kernel: [] for kernel in c.kernels}
    for _ in range(c.rounds + 1):
      for kernel, program in programs.items():
        since = time.process_time()
        jax.block_until_ready(program(*args))
        times[kernel].append(time.process_time() - since)
    for kernel, program in programs.items():
      low, median, high = 1e3 * np.percentile(times[kernel][1:], (25, 50, 75))
      megabytes = program.memory_analysis().temp_size_in_bytes / 1e6
      spread = f"{low:,.0f} to {high:,.0f}"
      table.add_row(f"{length:,}", kernel, f"{median:,.0f}", spread, f"{megabytes:,.0f}")
  console = Console()
  console.width = max(console.width, 80)
  console.print(f"jax {jax.__version__}")
  console.print(table)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
