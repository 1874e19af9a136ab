"""Memory of the loss and its gradients, as compiled, in chunks and whole: nothing is run.

  python tools/benchmarks/loss_memory.py [--vocab 131072] [--dim 1024] [--chunk 1024]

Temporary memory is what the program needs beside its arguments (hidden states, table) and results
(their gradients). Operands are bfloat16 on accelerators and float32 on CPU, as in training.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bigtrain.kernels.cross_entropy import cross_entropy
from bigtrain.precision import compute_dtype


def temporary_gib(length: int, vocab: int, dim: int, chunk: int | None) -> float:
  """GiB beside arguments and results, for one row of `length` tokens."""
  dtype = compute_dtype("auto")
  x_BTD = jax.ShapeDtypeStruct((1, length, dim), dtype)
  table_VD = jax.ShapeDtypeStruct((vocab, dim), dtype)
  targets_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
  weights_BT = jax.ShapeDtypeStruct((1, length), jnp.float32)
  loss = lambda *arrays: cross_entropy(*arrays, chunk=chunk)[0]
  lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
    x_BTD, table_VD, targets_BT, weights_BT
  )
  memory: Any = lowered.compile().memory_analysis()
  return memory.temp_size_in_bytes / 2**30


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--vocab", type=int, default=131072)
  parser.add_argument("--dim", type=int, default=1024)
  parser.add_argument("--chunk", type=int, default=1024, help="tokens")
  args = parser.parse_args()
  table = Table(title=f"Temporary memory, V = {args.vocab}, D = {args.dim} (GiB)")
  columns = ("tokens", "float32 logits", f"chunks of {args.chunk}", "whole (loss_chunk None)")
  for column in columns:
    table.add_column(column, justify="right")
  for length in (1024, 2048, 4096, 8192, 16384):
    logits = 4 * length * args.vocab / 2**30
    measured = (temporary_gib(length, args.vocab, args.dim, c) for c in (args.chunk, None))
    table.add_row(str(length), *(f"{gib:.2f}" for gib in (logits, *measured)))
  Console().print(table)


if __name__ == "__main__":
  main()
