"""Routers, their losses and their biases, against loops in numpy; refusals.

Dims: B batch, T position, D model, X expert, A choices of a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import taps
from bigtrain.config import Refused
from bigtrain.kernels.attention import Tokens
from bigtrain.models.initial import Initializer, Normal
from bigtrain.models.moe import BalanceLoss, Groups, MoEConfig, RouterConfig
from bigtrain.objectives.experts import load_max, rebalanced, with_experts
from bigtrain.objectives.output import Output
from bigtrain.parallel.expert import Capacity, Dropless
from bigtrain.state import partition

B, T, D, X, A = 3, 7, 6, 8, 2
SEGMENTS = np.array([[1] * 4 + [2] * 3, [1] * 5 + [0] * 2, [1] * 7])
REAL = SEGMENTS > 0
ROUTERS = {
  "softmax": RouterConfig(z_loss=0.5, balance_loss=BalanceLoss(factor=0.1)),
  "by row": RouterConfig(
    normalized=False, scale=3.0, balance_loss=BalanceLoss(factor=0.2, over="row")
  ),
  "sigmoid": RouterConfig(
    scores="sigmoid",
    scale=2.5,
    groups=Groups(groups=4, kept=2),
    balance_loss=BalanceLoss(factor=0.1, over="row"),
    bias_rate=0.01,
  ),
}


def layer(router: RouterConfig, **fields):
  c = MoEConfig(experts=X, top_k=A, hidden=4, router=router, **fields)
  c.check()
  made = c.make(D, Initializer(Normal(std=0.7), 2), jax.random.key(0))
  if router.bias_rate is not None:
    made.balance_bias_X[...] = jnp.linspace(-0.3, 0.3, X)
  return made


@jax.jit
def routed(layer, x_BTD):
  given = (x_BTD, jnp.asarray(REAL))
  return taps.collect(lambda: layer._routed(*given), sums=True)()


def tokens(x):
  return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32) + x


def chosen(c: RouterConfig, logits, bias):
  """One token's experts by weight, and every expert's probability."""
  if c.scores == "softmax":
    scores = np.exp(logits - logits.max())
    scores = prob = scores / scores.sum()
  else:
    scores = 1 / (1 + np.exp(-logits))
    prob = scores / scores.sum()
  biased = scores + bias
  if c.groups is not None:
    members = np.arange(X).reshape(c.groups.groups, -1)
    value = [np.sort(biased[m])[-2:].sum() for m in members]
    best = np.argsort(value)[-c.groups.kept :]
    biased = [s if e // len(members[0]) in best else -np.inf for e, s in enumerate(biased)]
  experts = np.argsort(biased)[::-1][:A]
  weights = scores[experts] / (scores[experts].sum() if c.normalized else 1)
  return experts, c.scale * weights, prob


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_router_equals_a_loop_over_tokens(router):
  made, x = layer(router), tokens(0)
  (weights, choice), sums = routed(made, x)
  bias = np.zeros(X) if made.balance_bias_X is None else np.asarray(made.balance_bias_X[...])
  logits = x.astype(np.float64) @ np.asarray(made.router_DX[...], np.float64)
  load, prob, z = np.zeros((B, X)), np.zeros((B, X)), np.zeros(B)
  for b, t in np.ndindex(B, T):
    experts, factors, p = chosen(router, logits[b, t], bias)
    np.testing.assert_allclose(weights[b, t], factors, rtol=1e-5)
    np.testing.assert_array_equal(choice[b, t], experts if REAL[b, t] else [X] * A)
    if REAL[b, t]:
      load[b, experts] += 1
      prob[b] += p
      z[b] += np.log(np.exp(logits[b, t]).sum()) ** 2
  np.testing.assert_array_equal(sums["sum:load/"], load.sum(0))
  if router.balance_loss.over == "batch":
    load, prob = np.tile(load.sum(0), (B, 1)), np.tile(prob.sum(0), (B, 1))
  share, mean = (a / a.sum(1, keepdims=True) for a in (load, prob))
  wanted = router.balance_loss.factor * X * (share * mean).sum(1)
  np.testing.assert_allclose(sums["sum:row:balance_loss/"], wanted, rtol=1e-5)
  if router.z_loss:
    np.testing.assert_allclose(sums["sum:row:router_z_loss/"], 0.5 * z / REAL.sum(1), rtol=1e-5)
  else:
    assert "sum:row:router_z_loss/" not in sums


def test_even_experts_have_a_balance_loss_of_its_factor():
  made = layer(RouterConfig(balance_loss=BalanceLoss(factor=0.3)))
  made.router_DX[...] = jnp.zeros((D, X))
  _, sums = routed(made, tokens(0))
  np.testing.assert_allclose(sums["sum:row:balance_loss/"], 0.3, rtol=1e-6)


def test_padding_passes_through_the_shared_expert_alone():
  made, x = layer(ROUTERS["softmax"], shared=4), tokens(0)
  given = Tokens(jnp.zeros((B, T), jnp.int32), jnp.asarray(SEGMENTS))
  y, shared = jax.jit(lambda m, x: (m(x, tokens=given), m.shared(x)))(made, x)
  same = np.isclose(y, shared, atol=1e-6).all(-1)
  np.testing.assert_array_equal(same, ~REAL)


def test_biases_move_against_the_load_once_by_the_rate():
  made = layer(ROUTERS["sigmoid"])
  variables = partition(made)[1]
  load = jnp.array([9.0, 1, 5, 5, 5, 5, 5, 5])
  after = rebalanced(made, variables, {"": load})
  moved = jax.tree.leaves(after)[0] - made.balance_bias_X[...]
  np.testing.assert_allclose(moved, [-0.01, 0.01, 0, 0, 0, 0, 0, 0], atol=1e-7)
  assert load_max({"a": load, "b": jnp.ones((2, X))}) == pytest.approx(9 / 5)


def test_losses_of_all_layers_are_weighted_as_rows_are_and_overflow_is_a_share():
  def objective(model, batch, key):
    del model, key
    taps.tap("sum:row:balance_loss/a", lambda: jnp.array([[1.0, 2.0], [3.0, 4.0]]))  # Two layers.
    taps.tap("sum:load/a", lambda: jnp.full((2, X), 5.0))
    taps.tap("sum:overflow/a", lambda: jnp.array([3.0, 5.0]))
    weight = batch["weights"].sum()
    return Output(10.0 * weight, weight, {"loss": (10.0 * weight, weight)})

  weights = jnp.array([[1.0, 1, 1], [1, 0, 0]])
  output = with_experts(objective)(None, {"weights": weights}, None)
  added = 3 * (1 + 3) + 1 * (2 + 4)
  assert output.loss_sum == 40 + added and output.metrics["loss"] == (40, 4)
  assert output.metrics["balance_loss"] == (added, 4)
  assert output.metrics["overflow"] == (8, 80)


def test_an_objective_without_experts_is_left_as_it_is():
  output = Output(jnp.ones(()), jnp.ones(()), {})
  assert with_experts(lambda *_: output)(None, {}, None) is output


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"top_k": 9}, "top_k is 9, of 8 experts"),
    ({"experts": 0}, "experts is 0"),
    ({"activation": "prelu"}, "choose another than prelu"),
    ({"router": RouterConfig(groups=Groups(groups=3, kept=1))}, "groups must divide experts"),
    ({"router": RouterConfig(groups=Groups(groups=8, kept=1))}, "top_k is 2, of 1 experts"),
    ({"router": RouterConfig(bias_rate=0.0)}, "bias_rate is 0.0"),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  c = dataclasses.replace(MoEConfig(experts=X, top_k=A, hidden=4), **fields)
  with pytest.raises(Refused, match=message):
    c.check()


def test_a_buffer_below_an_even_share_and_no_slots_are_refused():
  with pytest.raises(Refused, match="even experts need 1"):
    Dropless(buffer=0.5).check()
  with pytest.raises(Refused, match="factor is 0"):
    Capacity(factor=0.0).check()
