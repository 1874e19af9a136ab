"""Span corruption: values by the formula, and sharded training that equals one device.

Dims: B batch, S source position, T target position, V vocabulary.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from bigtrain.config import config
from bigtrain.experiment import DataConfig, Experiment
from bigtrain.kernels.attention import Tokens
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.encoder_decoder import EncoderDecoderConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import FanIn
from bigtrain.models.position import RelativeBuckets
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import SpanCorruption
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine
from bigtrain.program import Program
from bigtrain.train import train
from tests import packed
from tests.models.build import filled

TARGETS = 7  # Columns of the targets; the source has packed.T.


@config
class Sources(DataConfig):
  """Packed rows of sources and shorter packed rows of their targets."""

  seq: int = packed.T
  targets: int = TARGETS

  def make(self, seed: int) -> "SourcesData":
    return SourcesData(packed.Packed(seq=self.seq), seed, self.targets)

  def vocabulary(self) -> int:
    return packed.V

  def row_length(self) -> int:
    return self.seq


class SourcesData(packed.PackedData):
  def __init__(self, c, seed: int, targets: int):
    packed.PackedData.__init__(self, c, seed)
    self.targets = targets

  def spec(self, size):
    names = ("targets", "weights", "target_positions", "target_segments")
    spec = packed.PackedData.spec(self, size)
    kinds = {name: np.float32 if name == "weights" else np.int32 for name in names}
    return spec | {k: jax.ShapeDtypeStruct((size, self.targets), kind) for k, kind in kinds.items()}

  def _rows(self, stream: int, wanted):
    """Each document's targets are about its first tokens, less one."""
    batch = packed.PackedData._rows(self, stream, wanted)
    shape = len(batch["tokens"]), self.targets
    names = ("targets", "target_positions", "target_segments")
    rows = {name: np.zeros(shape, np.int32) for name in names}
    for i, segments in enumerate(batch["segments"]):
      column = 0
      for document in range(1, segments.max() + 1):
        tokens = batch["tokens"][i][segments == document]
        n = min(max(len(tokens) - 2, 1), self.targets - column)
        here = slice(column, column + n)
        rows["targets"][i, here] = tokens[:n] - 1
        rows["target_positions"][i, here] = np.arange(n)
        rows["target_segments"][i, here] = document
        column += n
    rows["weights"] = (rows["target_segments"] > 0).astype(np.float32)
    return {k: batch[k] for k in ("tokens", "positions", "segments")} | rows


def experiment(**fields) -> Experiment:
  """Dropout wherever there is some, recomputation and unrolling."""
  block = BlockConfig(
    attention=AttentionConfig(heads=8, head_dim=6, causal=False, scaled=False, dropout=0.1),
    feed_forward=FeedForwardConfig(hidden=packed.F, gated=True, dropout=0.1),
  )
  model = EncoderDecoderConfig(
    vocab=packed.V,
    dim=packed.D,
    layers=2,
    pattern=(block,),
    relative=RelativeBuckets(buckets=8, distance=8),
    dropout=0.1,
    init=FanIn(),
    remat="products",
    unroll=2,
    dtype="float32",
  )
  # See packed.py for eps.
  optimizer = AdamW(lr=1e-2, eps=1e-5, clip=0.5, schedule=Cosine(warmup=2))
  e = packed.experiment(optimizer=optimizer)
  parts = {"model": model, "data": Sources(), "objective": SpanCorruption(loss_chunk=16)}
  return dataclasses.replace(e, **parts | fields)


@functools.cache
def alone():
  e = experiment()
  state = packed.start(e)
  return state, packed.run(e, state, meshed=False)


def test_initialisation_gives_the_same_bits_on_a_mesh():
  e = experiment(mesh=Mesh(data=2, fsdp=2, tensor=2))
  plain = Program(e, None).compile_init()(jax.random.key(7))
  with jax.set_mesh(mesh := e.mesh.make()):
    spread = Program(e, mesh).compile_init()(jax.random.key(7))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(plain))


def test_five_steps_learn():
  _, (_, metrics) = alone()
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1


@pytest.mark.smoke
def test_the_loss_is_the_mean_over_real_targets_given_those_before_them():
  e = experiment()
  model, batch = filled(e.model.make), e.data.make(0).batch(0, 6)
  out = e.objective(model, batch, None)
  inputs = np.full_like(batch["targets"], e.model.start)
  for i, t in np.argwhere(batch["target_positions"] > 0):
    inputs[i, t] = batch["targets"][i, t - 1]
  source = Tokens(batch["positions"], batch["segments"])
  target = Tokens(batch["target_positions"], batch["target_segments"])
  logits_BTV = np.asarray(model(batch["tokens"], inputs, source, target), np.float64)
  log_p = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  nll_BT = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
  real, value = batch["target_segments"] > 0, {}
  for name, (total, weight) in out.metrics.items():
    value[name] = float(total / weight)
  assert (~real).sum() > 0 and out.weight == real.sum()
  assert value["loss"] == pytest.approx(nll_BT[real].mean(), rel=1e-5)
  assert value["accuracy"] == pytest.approx(
    (logits_BTV.argmax(-1) == batch["targets"])[real].mean()
  )
  assert e.objective.derived(value) == {"perplexity": pytest.approx(np.exp(value["loss"]))}


def test_a_run_trains_evaluates_and_counts_the_tokens_of_both_sides(tmp_path):
  e = experiment(steps=3, mesh=Mesh(data=8, fsdp=1))
  run = train(e, tmp_path / "run", quiet=True)
  assert run.evaluations["eval/validation/perplexity"][-1] > 1
  assert run.feed.lengths == (packed.T, TARGETS)
  seconds = run.metrics["step_seconds"][-1]
  per_step = {k: run.metrics[f"{k}_per_second"][-1] * seconds for k in ("tokens", "model_flops")}
  assert per_step["tokens"] == pytest.approx(packed.B * (packed.T + TARGETS))
  assert per_step["model_flops"] == pytest.approx(packed.B * e.model.flops(packed.T, TARGETS))
