"""A tiny experiment on made-up packed rows, with all that a decoder has; no text, no cache.

Every size is its own number, so that the shape of an array tells what it is.

Dims: B batch, T position, V vocabulary, D model, F hidden, K kv heads, G queries per kv head,
H head.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np

from bigtrain import sharding
from bigtrain.config import config
from bigtrain.data.feed import put
from bigtrain.experiment import Data, DataConfig, Evaluation, Experiment, Logging
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine
from bigtrain.program import Program
from bigtrain.state import State

B, T, V, D, F, LAYERS = 8, 11, 80, 32, 112, 2
K, G, H = 8, 2, 6  # Grouped queries: two heads share a key and a value.

# Adam divides by the size of the gradient: where that is hardly more than rounding, the rounding
# becomes the update. At eps 1e-8 a leaf differs by up to 4e-5 for that reason, at 1e-5 by 2e-6.
ADAMW = AdamW(lr=1e-2, eps=1e-5, clip=0.5, average=0.9, schedule=Cosine(warmup=2))
MESHES = (
  Mesh(data=8, fsdp=1),
  Mesh(fsdp=8),
  Mesh(fsdp=1, tensor=8),
  Mesh(data=2, fsdp=4),
  Mesh(fsdp=4, tensor=2),
  Mesh(data=2, fsdp=2, tensor=2),
)
NAMES = [f"data={m.data},fsdp={m.fsdp},tensor={m.tensor}" for m in MESHES]


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
    kinds["weights"] = np.float32
    return {k: jax.ShapeDtypeStruct((size, self.c.seq), kind) for k, kind in kinds.items()}

  def batch(self, example, size, rows=None):
    batch = self._rows(self.seed, example + np.arange(size)[rows or slice(None)])
    return {name: batch[name] for name in self.spec(size)}

  def eval_examples(self):
    return self.c.examples

  def eval_batch(self, example, size, rows=None):
    wanted = example + np.arange(size)[rows or slice(None)]
    batch = self._rows(2**31, wanted)
    for values in batch.values():
      values[wanted >= self.c.examples] = 0
    return batch

  def _rows(self, stream: int, wanted) -> dict[str, np.ndarray]:
    rows = [self._row(np.random.default_rng([stream, int(i)])) for i in wanted]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _row(self, r: np.random.Generator) -> dict[str, np.ndarray]:
    """Documents of 1 to T/2 tokens until less than a random part of the row is left."""
    length = self.c.seq
    row = {name: np.zeros(length, np.int32) for name in ("segments", "positions")}
    # Few words are frequent: there is something to learn.
    tokens = np.minimum(r.geometric(0.1, length + 1), V - 1).astype(np.int32)
    row["tokens"], row["targets"] = tokens[:-1], tokens[1:]
    column, document, end = 0, 0, length - r.integers(0, length // 2)
    while column < end:
      n, document = min(r.integers(1, length // 2 + 1), end - column), document + 1
      row["segments"][column : column + n] = document
      row["positions"][column : column + n] = np.arange(n)
      column += n
    row["weights"] = (row["segments"] > 0).astype(np.float32)
    row["bytes"] = (r.integers(1, 6, length) * row["weights"]).astype(np.float32)
    return row


def experiment(*, model=None, attention=None, **fields) -> Experiment:
  """Grouped queries, rotations, QK-norm, gates, shifts, every bias, dropout; with some replaced."""
  heads = {"heads": K * G, "kv_heads": K, "head_dim": H, "bias": True, "out_bias": True}
  extras = {"rotary": Rotary(), "qk_norm": RMSNormConfig(), "dropout": 0.1}
  block = BlockConfig(
    attention=AttentionConfig(**heads | extras | (attention or {})),
    feed_forward=FeedForwardConfig(hidden=F, activation="silu", gated=True, bias=True),
  )
  sizes = {"vocab": V, "dim": D, "layers": LAYERS, "pattern": (block,), "shift": True}
  parts = {
    "model": LanguageModelConfig(**sizes | {"dropout": 0.1, "dtype": "float32"} | (model or {})),
    "data": Packed(),
    "optimizer": AdamW(lr=1e-2, schedule=Cosine(warmup=2)),
    "objective": CausalLM(),
    "mesh": Mesh(),
    "evaluation": Evaluation(every=0, batch=8),
    "logging": Logging(every=1, tensorboard=False),
  }
  return Experiment(**parts | {"steps": 5, "batch": B} | fields)


@functools.cache
def compiled(e: Experiment, *, meshed: bool = True):
  """The mesh, the program and the compiled step of `e`, kept for whoever asks again."""
  mesh = e.mesh.make() if meshed else None
  program = Program(e, mesh)
  with in_mesh(mesh):
    return mesh, program, program.compile_step(e.data.make(e.seed).spec(e.batch))


def abstract_batch(e: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a batch on the mesh in force."""
  place = sharding.batch_sharding()
  spec = e.data.make(e.seed).spec(e.batch)
  return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for k, x in spec.items()}


def in_mesh(mesh: jax.sharding.Mesh | None):
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def start(e: Experiment) -> State:
  """The first state, in numpy, its weights moved at random: nothing is zero, one or equal."""
  r = np.random.default_rng(0)
  state = Program(e, None).compile_init()(jax.random.key(e.seed))
  moved = jax.tree.map(lambda w: w + r.normal(0, 0.1, w.shape).astype(w.dtype), state.model)
  return jax.tree.map(np.asarray, dataclasses.replace(state, model=moved))


def run(e: Experiment, state: State, *, meshed: bool = True) -> tuple[State, list[dict]]:
  """The state after all steps, and the metrics of each, in numpy."""
  mesh, program, step = compiled(e, meshed=meshed)
  data, metrics = e.data.make(e.seed), []
  with in_mesh(mesh):
    place = lambda x, like: jax.device_put(x, like.sharding)
    leaves, structure = jax.tree.flatten(jax.tree.map(place, state, program.abstract()))
    for i in range(e.steps):
      rows = lambda wanted, i=i: data.batch(i * e.batch, e.batch, wanted)
      leaves, values = step(leaves, put(rows, e.batch, sharding.batch_sharding()))
      metrics.append(jax.device_get(values))
  return jax.tree.unflatten(structure, jax.device_get(leaves)), metrics


def distances(got, wanted) -> dict[str, float]:
  """The norm of the difference of each leaf, relative to that of the leaf that is wanted."""
  pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
  norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
  return {
    jax.tree_util.keystr(path): norm(np.subtract(a, b, dtype=np.float64)) / max(norm(b), 1e-30)
    for (path, a), b in pairs
  }


def assert_equal(e: Experiment, got, wanted) -> None:
  """Of two runs of `e`: weights, moments, averages and metrics are the same to rounding."""
  (state, metrics), (state0, metrics0) = got, wanted
  assert int(state.step) == e.steps and int(state.example) == e.steps * e.batch
  found = distances(
    (state.model, state.optimizer, metrics), (state0.model, state0.optimizer, metrics0)
  )
  assert {k: d for k, d in found.items() if not d <= 1e-5} == {}
