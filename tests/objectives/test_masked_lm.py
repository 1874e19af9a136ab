"""The masked-token objective: values by the formula, and sharded training that equals one device.

Dims: B batch, T position, V vocabulary, C class.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.config import Refused, config
from bigtrain.experiment import DataConfig, Experiment
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.encoder import EncoderConfig, MaskedLMConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.norm import LayerNormConfig
from bigtrain.models.position import Learned
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import MaskedLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine
from bigtrain.train import train
from tests import packed
from tests.models.build import filled


@config
class Guesses(DataConfig):
  """Packed rows of which some tokens are to be guessed; where asked, of pairs."""

  pairs: bool = False
  seq: int = packed.T

  def make(self, seed: int) -> "GuessesData":
    return GuessesData(packed.Packed(seq=self.seq), seed, pairs=self.pairs)

  def vocabulary(self) -> int:
    return packed.V

  def row_length(self) -> int:
    return self.seq


class GuessesData(packed.PackedData):
  def __init__(self, c, seed: int, *, pairs: bool):
    packed.PackedData.__init__(self, c, seed)
    self.pairs = pairs

  def spec(self, size):
    spec = packed.PackedData.spec(self, size)
    spec["token_types"] = spec["tokens"]
    if self.pairs:
      spec["next_sentence"] = jax.ShapeDtypeStruct((size,), np.int32)
    return spec

  def _rows(self, stream: int, wanted):
    batch = packed.PackedData._rows(self, stream, wanted)
    batch["token_types"] = (batch["positions"] > 2).astype(np.int32)
    if self.pairs:
      batch["segments"] = np.minimum(batch["segments"], 1)
      batch["next_sentence"] = (batch["tokens"][:, 0] < 8).astype(np.int32)
    batch["weights"] *= batch["tokens"] % 3 == 0
    batch["targets"] = batch["tokens"]
    return batch


def experiment(*, pairs=True, seq=packed.T, **fields) -> Experiment:
  block = BlockConfig(
    attention=AttentionConfig(heads=8, head_dim=6, causal=False, bias=True, out_bias=True),
    feed_forward=FeedForwardConfig(hidden=packed.F, activation="gelu", bias=True),
  )
  encoder = EncoderConfig(
    vocab=packed.V,
    dim=packed.D,
    layers=packed.LAYERS,
    pattern=(block,),
    position=Learned(length=seq),
    norm=LayerNormConfig(eps=1e-12),
    norm_placement="post",
    dropout=0.1,
    dtype="float32",
  )
  # See packed.py for eps.
  optimizer = AdamW(lr=1e-2, eps=1e-5, clip=0.5, schedule=Cosine(warmup=2))
  e = packed.experiment(optimizer=optimizer)
  parts = {
    "model": MaskedLMConfig(encoder=encoder, next_sentence=pairs),
    "data": Guesses(pairs=pairs, seq=seq),
    "objective": MaskedLM(loss_chunk=16),
  }
  return dataclasses.replace(e, **parts | fields)


@functools.cache
def alone(pairs=True):
  e = experiment(pairs=pairs)
  state = packed.start(e)
  return state, packed.run(e, state, meshed=False)


@pytest.mark.parametrize("pairs", [False, True])
def test_five_steps_learn(pairs):
  _, (_, metrics) = alone(pairs)
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
  assert ("next_sentence_loss" in metrics[0]) == pairs


@pytest.mark.smoke
def test_the_loss_is_the_mean_over_guessed_tokens_plus_that_over_pairs_weighted_as_their_rows():
  e = experiment()
  model = filled(e.model.make)
  batch = e.data.make(0).batch(0, 6)
  batch["source/a"] = np.float32([1, 0, 1, 1, 0, 0])
  batch["source/b"] = 1 - batch["source/a"]
  out = e.objective(model, batch, None)
  rows = (batch[name] for name in ("tokens", "positions", "segments", "token_types"))
  rows = tuple(rows)
  logits_BTV = np.asarray(model(*rows), np.float64)
  following_BC = np.asarray(model.next_sentence(model.encoder(*rows)), np.float64)
  log_p = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  nll_BT = -np.take_along_axis(log_p(logits_BTV), batch["targets"][..., None], -1)[..., 0]
  nll_B = -log_p(following_BC)[np.arange(6), batch["next_sentence"]]
  weights = batch["weights"]
  value = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
  assert value["loss"] == pytest.approx((nll_BT * weights).sum() / weights.sum(), rel=1e-5)
  for name in "ab":
    own = weights * batch[f"source/{name}"][:, None]
    assert value[f"loss/{name}"] == pytest.approx((nll_BT * own).sum() / own.sum(), rel=1e-5)
  right = (logits_BTV.argmax(-1) == batch["targets"]) * weights
  assert value["accuracy"] == pytest.approx(right.sum() / weights.sum())
  assert value["next_sentence_loss"] == pytest.approx(nll_B.mean(), rel=1e-5)
  hits = following_BC.argmax(-1) == batch["next_sentence"]
  assert value["next_sentence_accuracy"] == pytest.approx(hits.mean())
  share_B = weights.sum(1) / weights.sum()
  total = float(out.loss_sum / out.weight)
  assert total == pytest.approx(value["loss"] + (share_B * nll_B).sum(), rel=1e-5)
  assert e.objective.derived(value) == {"perplexity": pytest.approx(np.exp(value["loss"]))}


@pytest.mark.smoke
def test_parts_of_a_batch_add_up_and_padding_rows_count_nothing():
  e = experiment()
  model, objective = filled(e.model.make), e.objective
  data = e.data.make(0)
  whole = objective(model, data.batch(0, 6), None)
  halves = [objective(model, data.batch(0, 6, s), None) for s in (slice(0, 2), slice(2, 6))]
  padded = {k: np.concatenate([v, np.zeros_like(v[:2])]) for k, v in data.batch(0, 6).items()}
  for other in (jax.tree.map(jnp.add, *halves), objective(model, padded, None)):
    chex.assert_trees_all_close(other, whole, rtol=2e-5, atol=0)


def test_a_run_of_pairs_trains_evaluates_and_counts_its_tokens(tmp_path):
  e = experiment(steps=2, mesh=Mesh(data=8, fsdp=1))
  run = train(e, tmp_path / "run", quiet=True)
  found = run.evaluations
  assert 0 <= found["eval/validation/next_sentence_accuracy"][-1] <= 1
  assert found["eval/validation/perplexity"][-1] > 1 and run.feed.shape == (packed.B, packed.T)


def test_a_head_without_pairs_and_pairs_without_a_head_are_refused():
  both = experiment(pairs=True), experiment(pairs=False)
  for e, other in (both, both[::-1]):
    model = filled(e.model.make)
    with pytest.raises(Refused, match=r"data\.next_sentence is .* give both the same"):
      e.objective(model, other.data.make(0).batch(0, 2), None)
  with pytest.raises(Refused, match="loss_chunk is 0"):
    MaskedLM(loss_chunk=0).check()
