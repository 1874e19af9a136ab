"""Memory of a pipelined step as compiled, by the number of microbatches: nothing is run.

  python tools/benchmarks/pipeline_memory.py [--stages 4] [--topology v5p:2x2x1]

The temporary memory of one device is what its program needs beside its arguments (weights, rows)
and results (gradients). Without --topology the devices are virtual ones of the CPU.
"""

import argparse
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bigtrain import sharding
from bigtrain.kernels.attention import Tokens
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.transformer import BlockConfig, Transformer, TransformerConfig
from bigtrain.parallel.pipeline import Pipeline


def temporary_mib(mesh, args, c: Pipeline, rows: int, parts: int) -> float:
  """MiB of a device for the gradient of a stack of blocks by `rows` rows, in `parts` in turn."""
  block = BlockConfig(
    attention=AttentionConfig(heads=args.dim // 64),
    feed_forward=FeedForwardConfig(hidden=4 * args.dim),
  )
  stack = TransformerConfig(dim=args.dim, layers=args.layers, pattern=(block,), pipeline=c)
  with jax.set_mesh(mesh):
    model = jax.eval_shape(lambda: Transformer(stack, jax.random.key(0)))
    place = lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    model = jax.tree.map(lambda x: place(x, x.sharding.spec), model)
    x_CBTD = jax.ShapeDtypeStruct((parts, rows // parts, args.length, args.dim), args.dtype)
    x_CBTD = place(x_CBTD, jax.P(None, *sharding.act("BTD")))

    def loss(model, x_BTD):
      positions_BT = jnp.zeros_like(x_BTD[..., 0], jnp.int32) + jnp.arange(args.length)
      return jnp.sum(model(x_BTD, Tokens(positions_BT))[0] ** 2)

    def gradient(model, x_CBTD):
      add = lambda total, x_BTD: (jax.tree.map(jnp.add, total, jax.grad(loss)(model, x_BTD)), None)
      return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, model), x_CBTD)[0]

    # Buffers are assigned before LLVM, whose optimisation takes longer than all else.
    options = {} if args.topology else {"xla_backend_optimization_level": "0"}
    compiled = jax.jit(gradient).lower(model, x_CBTD).compile(compiler_options=options)
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def settings(stages: int) -> Iterator[tuple[str, Pipeline, int]]:
  """(name, schedule, microbatches of one part; 0 for all of them)."""
  yield "layer inputs", Pipeline(keep="layers"), 0
  yield "stage inputs", Pipeline(keep="stages"), 0
  for rounds in (1, 2):
    name = f"layer inputs, {2 * stages} at a time, rounds={rounds}"
    yield name, Pipeline(keep="layers", rounds=rounds), 2 * stages


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--stages", type=int, default=4)
  parser.add_argument("--layers", type=int, default=8)
  parser.add_argument("--dim", type=int, default=256)
  parser.add_argument("--length", type=int, default=256, help="tokens of a row")
  parser.add_argument("--topology", help="such as v5p:2x2x1: compile for chips that are not here")
  args = parser.parse_args()
  if args.topology:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    found = topologies.get_topology_desc(args.topology, platform="tpu")
    devices, args.dtype = list(found.devices)[: args.stages], jnp.bfloat16
  else:
    jax.config.update("jax_num_cpu_devices", args.stages)
    devices, args.dtype = None, jnp.float32
  mesh = Mesh(pipeline=args.stages, fsdp=1).make(devices)
  counts = [args.stages * n for n in (4, 8, 16)]
  activation = args.length * args.dim * jnp.dtype(args.dtype).itemsize / 2**20
  title = f"MiB of temporary memory; one row's activation, a microbatch: {activation:.2f} MiB"
  table = Table("kept for the backward pass", *map(str, counts), title=title)
  for name, c, at_once in settings(args.stages):
    cells = []
    for m in counts:
      c.microbatches = min(at_once or m, m)
      cells.append(f"{temporary_mib(mesh, args, c, rows=m, parts=m // c.microbatches):.1f}")
    table.add_row(name, *cells)
  Console().print(table)


if __name__ == "__main__":
  main()
