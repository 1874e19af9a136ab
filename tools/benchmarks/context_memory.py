"""The memory that a training step takes on each device, by how far its rows are cut.

  uv run python tools/benchmarks/context_memory.py [--length 131072] [--ulysses | --sequence]

The step of a small decoder on one long row is compiled for 1, 2, 4, ... virtual CPU devices along
`context`, and the compiler's own figures are printed. Nothing is run. With --sequence it is for as
many devices along `tensor`, without and with `--mesh.sequence`.
"""

import dataclasses
import time

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bigtrain import sharding
from bigtrain.data.text import TextData
from bigtrain.experiment import Experiment
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.program import Program


@dataclasses.dataclass
class Settings:
  """Compiles a small decoder's step for more and more devices and prints its memory."""

  length: int = 131_072  # Tokens of the one row.
  devices: tuple[int, ...] = (1, 2, 4, 8)
  ulysses: bool = False  # Exchange positions for heads, in place of a ring.
  sequence: bool = False  # Compare `tensor` without and with `sequence`, in place of `context`.
  layers: int = 4
  dim: int = 256


def experiment(c: Settings, mesh: Mesh) -> Experiment:
  """Grouped queries, float32, and only the input of each block kept for the backward pass."""
  block = BlockConfig(
    attention=AttentionConfig(heads=16, kv_heads=8, head_dim=32, rotary=Rotary()),
    feed_forward=FeedForwardConfig(hidden=3 * c.dim, activation="silu", gated=True),
  )
  return Experiment(
    model=LanguageModelConfig(vocab=256, dim=c.dim, layers=c.layers, pattern=(block,)),
    data=TextData(seq=c.length),
    optimizer=AdamW(lr=1e-3),
    objective=CausalLM(),
    steps=1,
    batch=1,
    mesh=mesh,
  )


def compiled_memory(e: Experiment, devices: int) -> tuple[int, int]:
  """Bytes of arguments (the state, updated in place) and of temporaries on each device."""
  mesh = e.mesh.make(jax.devices()[:devices])
  with jax.set_mesh(mesh):
    program, place = Program(e, mesh), sharding.batch_sharding()
    kinds = dict.fromkeys(("tokens", "targets", "segments", "positions"), np.int32)
    shape = (e.batch, e.data.row_length())
    batch = {
      name: jax.ShapeDtypeStruct(shape, kind, sharding=place)
      for name, kind in (kinds | {"weights": np.float32}).items()
    }
    step = jax.jit(program.step, donate_argnums=0).lower(program.abstract(), batch).compile()
  memory = step.memory_analysis()
  return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def main(c: Settings) -> None:
  jax.config.update("jax_num_cpu_devices", max(c.devices))
  table = Table("mesh", "state, MB", "temporary, MB", "of the first", "compiled in s")
  first = None
  for mesh, devices in _meshes(c):
    started = time.monotonic()
    state, size = compiled_memory(experiment(c, mesh), devices)
    first = first or size
    said = f"tensor={devices}" if c.sequence else f"context={devices}"
    said += ", sequence" if mesh.sequence else ", ulysses" if mesh.ulysses else ""
    seconds = time.monotonic() - started
    shown = (f"{n / 1e6:,.0f}" for n in (state, size))
    table.add_row(said, *shown, f"{size / first:.2f}", f"{seconds:.0f}")
  Console().print(table)


def _meshes(c: Settings) -> list[tuple[Mesh, int]]:
  if c.sequence:
    wide = [n for n in c.devices if n > 1]
    return [(Mesh(fsdp=1, tensor=n, sequence=cut), n) for n in wide for cut in (False, True)]
  return [(Mesh(fsdp=1, context=n, ulysses=c.ulysses and n > 1), n) for n in c.devices]


if __name__ == "__main__":
  main(tyro.cli(Settings))
