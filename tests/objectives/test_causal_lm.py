"""Dims: B batch, T position, D model, V vocabulary."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.config import Refused
from bigtrain.mesh import Mesh
from bigtrain.objectives import CausalLM

B, T, D, V = 8, 6, 4, 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Bigram:
  """A language model of one table in and one out."""

  embed_VD: jax.Array
  table_VD: jax.Array

  def hidden(self, tokens_BT, positions_BT, segments_BT, key):
    return self.embed_VD.at[tokens_BT].get(out_sharding=sharding.act("BTD"))

  def output_VD(self, x_BTD):
    return self.table_VD


def model():
  a, b = jax.random.split(jax.random.key(0))
  return Bigram(jax.random.normal(a, (V, D)), jax.random.normal(b, (V, D)))


def make_batch(rows=B, seed=0):
  r = np.random.default_rng(seed)
  tokens_BT = r.integers(0, V, (rows, T + 1)).astype(np.int32)
  return {
    "tokens": tokens_BT[:, :-1],
    "targets": tokens_BT[:, 1:],
    "weights": (r.random((rows, T)) < 0.7).astype(np.float32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T)),
    "segments": np.ones((rows, T), np.int32),
    "bytes": r.integers(1, 9, (rows, T)).astype(np.float32),
  }


def log_p(m, batch):
  """float64 log-probabilities (B, T, V)."""
  table = np.asarray(m.embed_VD, np.float64) @ np.asarray(m.table_VD, np.float64).T
  logits = table[batch["tokens"]]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def token_nll(m, batch):
  return -np.take_along_axis(log_p(m, batch), batch["targets"][..., None], -1)[..., 0]


def test_metrics_are_the_textbook_values():
  m, batch = model(), make_batch()
  out = CausalLM(z_loss=1e-3, label_smoothing=0.2)(m, batch, None)
  value = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
  weights, nll = batch["weights"], token_nll(m, batch)
  right = log_p(m, batch).argmax(-1) == batch["targets"]
  assert float(out.weight) == weights.sum()
  assert value["loss"] == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-6)
  assert value["accuracy"] == pytest.approx((right * weights).sum() / weights.sum(), rel=1e-6)
  bits = (nll * weights).sum() / np.log(2) / (batch["bytes"] * weights).sum()
  assert value["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
  assert value["nats_per_byte"] == pytest.approx(bits * np.log(2), rel=1e-6)
  assert CausalLM().derived(value) == {"perplexity": pytest.approx(np.exp(value["loss"]))}
  extras = out.loss_sum / out.weight - value["loss"] - value["z_loss"]
  smoothing = 0.2 * ((-log_p(m, batch).mean(-1) - nll) * weights).sum() / weights.sum()
  assert float(extras) == pytest.approx(smoothing, rel=1e-4)


def test_metrics_that_do_not_apply_are_absent():
  batch = make_batch()
  del batch["bytes"]
  assert set(CausalLM()(model(), batch, None).metrics) == {"loss", "accuracy"}


def test_outputs_of_unequal_microbatches_add_up_to_the_whole_batch():
  m, batch, objective = model(), make_batch(), CausalLM(loss_chunk=5, z_loss=1e-3)
  whole = objective(m, batch, None)
  halves = [jax.tree.map(lambda a, s=s: a[s], batch) for s in (slice(0, 3), slice(3, B))]
  added = jax.tree.map(jnp.add, *(objective(m, half, None) for half in halves))
  chex.assert_trees_all_close(added, whole, rtol=1e-6, atol=0)


def test_rows_of_weight_zero_change_nothing():
  m, batch = model(), make_batch()
  batch["weights"][5:] = 0
  kept = jax.tree.map(lambda a: a[:5], batch)
  whole, part = (CausalLM()(m, b, None) for b in (batch, kept))
  chex.assert_trees_all_close(whole, part, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss_chunk", [None, 7])
def test_a_mesh_changes_neither_values_nor_gradients(loss_chunk):
  objective = CausalLM(loss_chunk=loss_chunk, z_loss=1e-3, label_smoothing=0.1)

  def run(m, batch):
    def loss(m):
      out = objective(m, batch, None)
      return out.loss_sum / out.weight, out

    return jax.jit(jax.grad(loss, has_aux=True))(m)

  m, batch = model(), make_batch()
  wanted = jax.tree.leaves(run(m, batch))
  with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()):
    m = Bigram(m.embed_VD, jax.device_put(m.table_VD, sharding.act("VD")))
    got = jax.device_get(jax.tree.leaves(run(m, jax.device_put(batch, sharding.act("BT")))))
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "fields",
  [{"loss_chunk": 0}, {"z_loss": -1e-4}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}],
)
def test_impossible_values_are_refused_by_name(fields):
  with pytest.raises(Refused, match=next(iter(fields))):
    CausalLM(**fields).check()
