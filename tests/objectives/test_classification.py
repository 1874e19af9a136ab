"""Dims: B batch, C classes, R image row, S image column."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.config import Refused
from bigtrain.mesh import Mesh
from bigtrain.objectives.classification import Classification

B, R, S, C = 8, 6, 10, 7
KEY = jax.random.key(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
  """Logits are a product with the pixels."""

  w_IC: jax.Array

  def logits(self, inputs, key):
    flat = jnp.reshape(inputs, (len(inputs), -1), out_sharding=sharding.act("BI"))
    return flat @ self.w_IC


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Echo:
  """Logits are the inputs themselves."""

  def logits(self, inputs, key):
    return inputs


def images(seed=0, rows=B):
  r = np.random.default_rng(seed)
  return {
    "inputs": r.normal(size=(rows, R, S, 2)).astype(np.float32),
    "labels": r.integers(0, C, rows).astype(np.int32),
    "weights": np.where(np.arange(rows) == 2, 0.0, r.random(rows)).astype(np.float32),
  }


def scores(classes=C, rows=B, seed=1):
  r = np.random.default_rng(seed)
  return {
    "inputs": r.normal(size=(rows, classes)).astype(np.float32),
    "labels": r.integers(0, classes, rows).astype(np.int32),
    "weights": r.random(rows).astype(np.float32),
  }


def means(out):
  return {name: float(total / weight) for name, (total, weight) in out.metrics.items()}


def log_p(logits_BC):
  logits_BC = np.float64(logits_BC)
  return logits_BC - np.log(np.exp(logits_BC).sum(-1, keepdims=True))


def test_metrics_are_the_textbook_values():
  batch = scores()
  out = Classification(label_smoothing=0.2)(Echo(), batch, None)
  p, y, w = log_p(batch["inputs"]), batch["labels"], batch["weights"]
  mean = lambda values: (w * values).sum() / w.sum()
  nll, order = -p[np.arange(B), y], np.argsort(-p, axis=-1)
  assert means(out) == {
    "loss": pytest.approx(mean(nll), rel=1e-6),
    "accuracy": pytest.approx(mean(order[:, 0] == y), rel=1e-6),
    "top5_accuracy": pytest.approx(mean((order[:, :5] == y[:, None]).any(-1)), rel=1e-6),
  }
  wanted_BC = 0.8 * np.eye(C)[y] + 0.2 / C
  assert float(out.loss_sum) == pytest.approx((w * -(wanted_BC * p).sum(-1)).sum(), rel=1e-6)
  assert float(out.weight) == pytest.approx(w.sum())


def test_five_guesses_of_five_classes_are_no_metric_and_of_equals_the_first_is_taken():
  batch = scores(classes=5)
  assert set(Classification()(Echo(), batch, None).metrics) == {"loss", "accuracy"}
  equal = batch | {"inputs": np.zeros((B, C), np.float32), "labels": np.arange(B) % C}
  w = equal["weights"] / equal["weights"].sum()
  found = means(Classification()(Echo(), equal, None))
  assert found["accuracy"] == pytest.approx(w[equal["labels"] == 0].sum(), rel=1e-6)
  assert found["top5_accuracy"] == pytest.approx(w[equal["labels"] < 5].sum(), rel=1e-6)


def test_rows_of_weight_zero_change_nothing():
  batch = scores()
  batch["weights"][5:] = 0
  kept = jax.tree.map(lambda a: a[:5], batch)
  outs = [Classification(label_smoothing=0.1)(Echo(), b, None) for b in (batch, kept)]
  for a, b in zip(*map(jax.tree.leaves, outs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixture_is_of_a_row_and_the_next_by_the_share_of_its_label(kind):
  batch, objective = images(), Classification(**{kind: 1.0})
  inputs, share_B = map(np.asarray, objective._mix(batch["inputs"], batch["weights"], KEY))
  own, other = batch["inputs"], np.roll(batch["inputs"], -1, axis=0)
  assert share_B[1] == 1.0  # The row after it is padding.
  assert len(np.unique(share_B)) > B // 2
  if kind == "mixup":
    wide = share_B[:, None, None, None]
    np.testing.assert_allclose(inputs, wide * own + (1 - wide) * other, atol=1e-6)
    return
  kept = (inputs == own).all(-1)
  assert ((inputs == other).all(-1) | kept).all()
  np.testing.assert_allclose(kept.mean((1, 2)), share_B, atol=1e-6)
  for cut_RS in ~kept:  # What is not its own is one rectangle.
    np.testing.assert_array_equal(cut_RS, cut_RS.any(1)[:, None] & cut_RS.any(0)[None])


def test_the_loss_of_a_mixture_is_that_of_both_labels_by_their_shares():
  batch, objective = images(), Classification(mixup=1.0, cutmix=1.0, label_smoothing=0.1)
  model = Linear(np.random.default_rng(5).normal(size=(R * S * 2, C)).astype(np.float32))
  out = objective(model, batch, KEY)
  _, mixing = jax.random.split(KEY)
  inputs, share_B = map(np.asarray, objective._mix(batch["inputs"], batch["weights"], mixing))
  p, w, y = log_p(inputs.reshape(B, -1) @ model.w_IC), batch["weights"], np.eye(C)[batch["labels"]]
  mixed_BC = share_B[:, None] * y + (1 - share_B[:, None]) * np.roll(y, -1, axis=0)
  nll = lambda wanted_BC: (w * -(wanted_BC * p).sum(-1)).sum()
  assert float(out.metrics["loss"][0]) == pytest.approx(nll(mixed_BC), rel=1e-5)
  assert float(out.loss_sum) == pytest.approx(nll(0.9 * mixed_BC + 0.1 / C), rel=1e-5)
  right = (w * (mixed_BC * np.eye(C)[p.argmax(-1)]).sum(-1)).sum()
  assert float(out.metrics["accuracy"][0]) == pytest.approx(right, rel=1e-5)


def test_shares_follow_their_distribution():
  rows = 4000
  ones = np.ones((rows, 1, 1, 1), np.float32)
  share = lambda **kinds: np.asarray(Classification(**kinds)._mix(ones, ones[:, 0, 0, 0], KEY)[1])
  moments = lambda x: (x.mean(), x.var())
  np.testing.assert_allclose(moments(share(mixup=0.2)), (0.5, 0.25 / 1.4), atol=0.02)
  np.testing.assert_allclose(moments(share(mixup=3.0)), (0.5, 0.25 / 7), atol=0.02)
  # Of one pixel a cut takes all or nothing: with both on, half of the rows are cut.
  assert 0.4 < np.isin(share(mixup=3.0, cutmix=1.0), (0.0, 1.0)).mean() < 0.6


def test_evaluation_and_another_key_of_the_same_batch_mix_nothing_and_otherwise():
  batch, objective = images(), Classification(mixup=0.5, cutmix=0.5)
  model = Linear(np.ones((R * S * 2, C), np.float32) * np.arange(C, dtype=np.float32))
  plain = Classification()(model, batch, KEY)
  loss = lambda key: float(objective(model, batch, key).loss_sum)
  assert loss(None) == float(plain.loss_sum)
  assert len({loss(None), loss(KEY), loss(jax.random.key(4))}) == 3
  assert loss(KEY) == loss(KEY)


@pytest.mark.parametrize("mesh", [Mesh(data=8, fsdp=1), Mesh(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_neither_values_nor_gradients(mesh):
  objective = Classification(mixup=0.5, cutmix=0.5, label_smoothing=0.1)
  w_IC = np.random.default_rng(5).normal(size=(R * S * 2, C)).astype(np.float32)

  @jax.jit
  def run(w_IC, batch):
    def loss(w_IC):
      out = objective(Linear(w_IC), batch, KEY)
      return out.loss_sum, out

    return jax.grad(loss, has_aux=True)(w_IC)

  wanted = run(w_IC, images())
  with jax.set_mesh(mesh.make()):
    got = run(w_IC, jax.device_put(images(), sharding.batch_sharding()))
  chex.assert_trees_all_close(jax.device_get(got), wanted, rtol=1e-5, atol=1e-5)


def test_impossible_values_are_refused_by_name():
  for fields in ({"label_smoothing": 1.0}, {"mixup": -0.1}, {"cutmix": -1.0}):
    with pytest.raises(Refused, match=next(iter(fields))):
      Classification(**fields).check()
  with pytest.raises(Refused, match=r"cutmix is for images.*\(8, 7\)"):
    Classification(cutmix=1.0)(Echo(), scores(), KEY)


def test_of_a_mixture_each_source_has_a_loss_of_its_own():
  batch = scores()
  sides = [np.arange(B) % 3 == k for k in range(3)]
  batch |= {f"source/{k}": side.astype(np.float32) for k, side in enumerate(sides)}
  found = means(Classification(label_smoothing=0.1)(Echo(), batch, None))
  nll = -log_p(batch["inputs"])[np.arange(B), batch["labels"]]
  for k, side in enumerate(sides):
    wanted = np.average(nll[side], weights=batch["weights"][side])
    assert found[f"loss/{k}"] == pytest.approx(wanted, rel=1e-5)


def test_a_label_that_the_model_has_no_score_for_is_no_perfect_guess():
  batch = scores() | {"labels": np.arange(B, dtype=np.int32)}  # The last one is not below C.
  found = means(Classification()(Echo(), batch, None))
  assert np.isnan(found["loss"]) and found["accuracy"] < 1


def test_a_row_alone_has_nothing_to_be_mixed_with():
  with pytest.raises(Refused, match="only one; take fewer microbatches"):
    Classification(mixup=0.2)(Echo(), scores(rows=1), KEY)
  Classification(mixup=0.2)(Echo(), scores(rows=1), None)
