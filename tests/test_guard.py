"""The guard: what it takes for a fault, against numpy, and that a fault moves nothing but time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigtrain import guard
from bigtrain.faults import Faults
from bigtrain.leaves import flatten
from bigtrain.program import Program
from tests import runs

pytestmark = pytest.mark.usefixtures("prepared")


def judged(c: Faults, losses, norms) -> tuple[list[bool], list[float]]:
  memory, good, scores = guard.begin(c), [], []
  judge = jax.jit(lambda memory, loss, norm: guard.judge(c, memory, loss, norm))
  for loss, norm in zip(losses, norms, strict=True):
    ok, score, memory = judge(memory, jnp.float32(loss), jnp.float32(norm))
    good.append(bool(ok))
    scores.append(float(score))
  return good, scores


def test_scores_are_those_of_numpy_and_faults_are_not_remembered():
  rng = np.random.default_rng(0)
  losses, norms = 3 + 0.1 * rng.normal(size=60), np.exp(0.2 * rng.normal(size=60))
  losses[40], norms[45], losses[50] = 9.0, 60.0, np.nan
  good, scores = judged(Faults(spike=8.0, window=16), losses, norms)
  assert [i for i, ok in enumerate(good) if not ok] == [40, 45, 50]
  kept = [[], []]
  for i, pair in enumerate(zip(losses, np.log(norms), strict=True)):
    if len(kept[0]) < 16:
      assert np.isnan(scores[i])
    elif i != 50:
      of = []
      for seen, now in zip(kept, pair, strict=True):
        median = np.median(seen[-16:])
        spread = 1.4826 * np.median(np.abs(seen[-16:] - median))
        least = (
          abs(median) if seen is kept[0] else 1.0
        )  # A share of a norm is a difference of logs.
        of.append((now - median) / max(spread, 0.01 * least))
      np.testing.assert_allclose(scores[i], max(of), rtol=1e-3)
    if good[i]:
      kept[0].append(pair[0]), kept[1].append(pair[1])


@pytest.mark.parametrize("norm", [1e-4, 1.0, 100.0])
def test_a_norm_that_stands_still_may_move_by_its_own_size(norm):
  norms = [norm] * 16 + [norm * 1.05, norm * 1.2]
  good, scores = judged(Faults(spike=8.0, window=16), np.ones(18), np.array(norms))
  assert good == [True] * 17 + [False]
  np.testing.assert_allclose(scores[16:], [np.log(1.05) / 0.01, np.log(1.2) / 0.01], rtol=1e-3)


def test_what_is_not_finite_is_no_new_normal():
  losses = [1.0, 1.1] * 8 + [5.0] * 3 + [np.inf, 30.0]
  good, scores = judged(Faults(spike=8.0, window=8, patience=3), losses, np.ones(21))
  assert good == [True] * 16 + [False] * 4 + [True] and scores[-1] > 100


def test_after_some_patience_a_higher_loss_is_the_new_normal():
  losses = [1.0, 1.1] * 8 + [5.0] * 6
  good, _ = judged(Faults(spike=8.0, window=8, patience=3), losses, np.ones(22))
  assert good == [True] * 16 + [False] * 3 + [True] * 3


def test_without_a_limit_only_what_is_not_finite_is_a_fault():
  good, scores = judged(Faults(), [1.0, 1e30, np.inf, 1.0], [1.0, 1.0, 1.0, np.nan])
  assert good == [True, True, False, False] and np.isnan(scores).all()


def test_what_is_not_applied_changes_no_bit():
  w = {"w": jnp.array([0.0, -0.0, 1.0])}
  tx = guard.guarded(optax.sgd(0.1))
  updates, _ = tx.update(w, tx.init(w), w, good=jnp.bool_(False))
  after = optax.apply_updates(w, updates)
  np.testing.assert_array_equal(*(np.asarray(x["w"]).view(np.uint32) for x in (after, w)))


def test_a_lowered_rate_recovers():
  c, memory, rates = (
    Faults(policy="lower_rate", recovery=3),
    guard.begin(Faults(policy="lower_rate")),
    [],
  )
  for loss in [1, np.nan, 1, np.nan, 1, 1, 1, 1, 1, 1, 1]:
    _, _, memory = guard.judge(c, memory, jnp.float32(loss), jnp.float32(1))
    rates.append(float(guard.rate(c, memory)))
  assert rates == [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1, 1]


@pytest.fixture(scope="module", params=["skip", "lower_rate", "on_host"])
def stepped(request, prepared):
  """The state before and after a batch with a NaN in it, and after that batch without one."""
  e = runs.base()
  e.faults.policy = "skip" if request.param == "on_host" else request.param
  e.optimizer_on_host = request.param == "on_host"
  program = Program(e, None)
  batch = e.data.make(0).batch(0, 8)
  bad = batch | {"weights": np.where(np.arange(64) == 3, np.nan, batch["weights"])}
  state = program.init(jax.random.key(0))
  step = jax.jit(program.step)
  state, _ = step(state, batch)
  return program, state, step(state, bad), step(state, batch)


def test_a_fault_leaves_everything_but_time_as_it_was(stepped):
  _, before, (after, metrics), (applied, other) = stepped
  assert metrics["skipped"] == 1 and other["skipped"] == 0 and np.isnan(metrics["loss"])
  assert int(after.step) == 2 and int(after.example) == 16
  moved = [
    name
    for (name, a), b in zip(flatten(before).items(), flatten(after).values(), strict=True)
    if not np.array_equal(a, b)
  ]
  assert {name for name in moved if not name.startswith("statistics.")} == {"step", "example"}
  assert "statistics.consumed" in moved
  assert not np.array_equal(*(flatten(s.model)["embed_VD"] for s in (before, applied)))


def test_a_lowered_rate_lowers_the_next_update(stepped):
  program, before, (after, _), (applied, metrics) = stepped
  if program.experiment.faults.policy != "lower_rate":
    return
  batch = program.experiment.data.make(0).batch(0, 8)
  at = dataclasses.replace(after, step=before.step)  # The same learning rate and the same key.
  lowered, then = jax.jit(program.step)(at, batch)
  np.testing.assert_allclose(then["learning_rate"], metrics["learning_rate"] / 2, rtol=1e-6)
  for name, w in flatten(before.model).items():
    full, half = flatten(applied.model)[name] - w, flatten(lowered.model)[name] - w
    np.testing.assert_allclose(half, full / 2, rtol=1e-2, atol=1e-7)
