"""The memory that a training step takes on each device, by how far its rows are cut.

  uv run python tools/benchmarks/context_memory.py [--length 131072] [--sequence]

The step of a small decoder on one long row is compiled for 1, 2, 4, ... virtual CPU devices along
`context`, and the compiler's own figures are printed. Nothing is run. With --sequence it is compiled
for as many devices along `tensor`, without and with `--mesh.sequence`.
"""

import dataclasses

import jax
import tyro
from rich.console import Console
from rich.table import Table

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

MB = 1e6


@dataclasses.dataclass
class Settings:
  """Compiles a small decoder's step for more and more devices and prints its memory."""

  length: int = 131_072  # Tokens of the one row.
  devices: tuple[int, ...] = (1, 2, 4, 8)
  ulysses: bool = False  # Exchange positions for heads, in place of a ring.
  sequence: bool = False  # Compare tensor with and without sequence, not sizes of context.
  layers: int = 4
  dim: int = 256
  dtype: str = "bfloat16"


def experiment(c: Settings, mesh: Mesh) -> Experiment:
  """Grouped queries, and no more than the input of each block kept for the backward pass."""
  from tests.packed import Packed

  block = BlockConfig(
    attention=AttentionConfig(heads=16, kv_heads=8, head_dim=32, rotary=Rotary()),
    feed_forward=FeedForwardConfig(hidden=3 * c.dim, activation="silu", gated=True),
  )
  model = LanguageModelConfig(
    vocab=256, dim=c.dim, layers=c.layers, pattern=(block,), dtype=c.dtype
  )
  data = Packed(seq=c.length)
  return Experiment(
    model=model, data=data, optimizer=AdamW(lr=1e-3), objective=CausalLM(), batch=1, mesh=mesh
  )
