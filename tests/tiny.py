"""A tiny experiment on made-up packed rows, and its step with or without a mesh.

Every size is its own number, so that the shape of an array tells what it is.
"""

import dataclasses

import jax
import numpy as np

from bigtrain import sharding
from bigtrain.config import config
from bigtrain.data.feed import put
from bigtrain.experiment import Data, DataConfig, Evaluation, Experiment, Logging
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine
from bigtrain.sharding import Mesh
from bigtrain.train import Program, State

B, T, V, D, F, LAYERS = 16, 12, 80, 32, 112, 2
K, G, H = 8, 2, 6  # Grouped queries: 16 heads share 8 keys and values.


@config
class Packed(DataConfig):
  """Rows of documents of unequal length, each row with its own padding."""

  seq: int = T
  examples: int = 13  # Held-out rows.

  def make(self, seed: int) -> "PackedData":
    return PackedData(self, seed)

  def vocabulary(self) -> int:
    return V

  def row_length(self) -> int:
    return self.seq


class PackedData(Data):
  def __init__(self, c: Packed, seed: int):
    self.c, self.seed = c, seed

  def spec(self, size):
    kinds = dict.fromkeys(("tokens", "targets", "segments", "positions"), np.int32)
    return {
      name: jax.ShapeDtypeStruct((size, self.c.seq), kind)
      for name, kind in (kinds | {"weights": np.float32}).items()
    }

  def batch(self, example, size, rows=None):
    wanted = example + np.arange(size)[rows or slice(None)]
    return _stack([self._row(self.seed, i) for i in wanted], without="bytes")

  def eval_examples(self):
    return self.c.examples

  def eval_batch(self, example, size, rows=None):
    wanted = example + np.arange(size)[rows or slice(None)]
    return _stack([self._row(2**31, i) for i in wanted], past=wanted >= self.c.examples)

  def _row(self, stream: int, example: int) -> dict[str, np.ndarray]:
    """Documents of 1 to T/2 tokens until fewer than a random number are left: padding."""
    r, T = np.random.default_rng([stream, int(example)]), self.c.seq
    row = {name: np.zeros(T, np.int32) for name in ("segments", "positions")}
    # Few words are frequent: there is something to learn.
    row["tokens"], row["targets"] = np.minimum(r.geometric(0.1, (2, T)), V - 1).astype(np.int32)
    column, segment, end = 0, 0, T - r.integers(0, T // 2)
    while column < end:
      length = min(r.integers(1, T // 2 + 1), end - column)
      segment += 1
      row["segments"][column : column + length] = segment
      row["positions"][column : column + length] = np.arange(length)
      column += length
    row["weights"] = (row["segments"] > 0).astype(np.float32)
    row["bytes"] = r.integers(1, 6, T) * row["weights"]
    return row


def _stack(rows, without=None, past=None):
  batch = {k: np.stack([row[k] for row in rows]) for k in rows[0] if k != without}
  if past is not None:
    batch = {k: np.where(past[:, None], 0, v).astype(v.dtype) for k, v in batch.items()}
  return batch


def experiment(*, model=None, attention=None, **fields) -> Experiment:
  """Grouped queries, rotations, QK-norm, gates, every bias, dropout on; some fields replaced."""
  block = BlockConfig(
    attention=AttentionConfig(
      **{
        "heads": K * G,
        "kv_heads": K,
        "head_dim": H,
        "rotary": Rotary(),
        "qk_norm": RMSNormConfig(),
        "bias": True,
        "out_bias": True,
        "dropout": 0.1,
        **(attention or {}),
      }
    ),
    feed_forward=FeedForwardConfig(hidden=F, activation="silu", gated=True, bias=True),
  )
  sizes = {"vocab": V, "dim": D, "layers": LAYERS, "pattern": (block,), "dropout": 0.1}
  parts = {
    "model": LanguageModelConfig(**sizes | {"dtype": "float32"} | (model or {})),
    "data": Packed(),
    "optimizer": AdamW(lr=1e-2, schedule=Cosine(warmup=2)),
    "objective": CausalLM(),
    "mesh": Mesh(data=1, fsdp=8, tensor=1),
    "evaluation": Evaluation(every=0, batch=8),
    "logging": Logging(every=1, tensorboard=False),
  }
  return Experiment(**parts | {"steps": 5, "batch": B} | fields)


def on(mesh: Mesh | None) -> jax.sharding.Mesh | None:
  return mesh and mesh.make()


def compiled(e: Experiment, mesh: jax.sharding.Mesh):
  """The program of `e` and its compiled step. The mesh must be in force."""
  program = Program(e, mesh)
  return program, program.compile_step(e.data.make(e.seed).spec(e.batch))
