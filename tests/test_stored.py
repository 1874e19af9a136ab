"""Weights in bfloat16: rounded at random, right in the mean, the same on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from bigtrain.mesh import Mesh
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Constant
from bigtrain.rounding import to_bfloat16
from bigtrain.stored import narrowed, updated, widened
from bigtrain.train import train
from tests import packed


def test_rounding_takes_one_of_the_two_nearest_and_is_right_in_the_mean():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
  found = np.stack([to_bfloat16(x, jax.random.key(i)).astype(jnp.float32) for i in range(500)])
  step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
  assert (np.abs(found - x) < step).all()
  assert set(np.unique(found[:, 0, 0])) == {
    float(np.float32(s * np.floor(abs(x[0, 0]) / step[0, 0] + d) * step[0, 0]))
    for s, d in ((np.sign(x[0, 0]), 0), (np.sign(x[0, 0]), 1))
  }
  assert (np.abs(found.mean(0) - x) < 5 * step / 2 / np.sqrt(500)).all()
  assert abs((found.mean(0) - x).mean()) < 5 * step.mean() / 2 / np.sqrt(500 * x.size)
  odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, 1.0])
  np.testing.assert_array_equal(to_bfloat16(odd, jax.random.key(0)).astype(jnp.float32), odd)


def test_the_bits_are_the_same_on_any_mesh():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
  wanted = to_bfloat16(x, jax.random.key(1))
  with jax.set_mesh(Mesh(fsdp=4, tensor=2).make()):
    got = jax.jit(to_bfloat16)(jax.device_put(x, P("fsdp", "tensor")), jax.random.key(1))
  np.testing.assert_array_equal(got, wanted)


def test_updates_below_the_smallest_step_add_up():
  """1,000 updates of 1e-4 to a weight of 1, whose neighbours are 0.0078 away."""
  model = narrowed("bfloat16", {"w_DF": jnp.ones((32, 32)), "bias_F": jnp.ones(32)})
  assert model["w_DF"].dtype == jnp.bfloat16 and model["bias_F"].dtype == jnp.float32
  add = jax.jit(lambda m, i: updated(m, {k: jnp.full(w.shape, 1e-4) for k, w in m.items()}, i))
  for i in range(1000):
    model = add(model, jax.random.key(i))
  model = widened(model)
  assert float(model["w_DF"].mean()) == pytest.approx(1.1, abs=0.005)
  np.testing.assert_allclose(model["bias_F"], 1.1, rtol=1e-4)


def experiment(**fields):
  optimizer = AdamW(lr=1e-2, schedule=Constant(warmup=2), moments="int8", clip=0.5)
  return packed.experiment(weights="bfloat16", optimizer=optimizer, batch=8, **fields)


@pytest.mark.slow
def test_a_run_learns_and_resumes_bit_for_bit(tmp_path):
  """With weights, moments and the histories of delayed scaling in the checkpoint."""
  from bigtrain.experiment import Checkpoints
  from bigtrain.products import Delayed, Gradients, Products

  products = Products(
    format="float8_e4m3fn",
    gradients=Gradients(format="float8_e5m2"),
    scaling=Delayed(history=4),
  )
  e = experiment(products=products, steps=6, checkpoints=Checkpoints(every=3, keep=2))
  e.mesh = Mesh(fsdp=4, tensor=2)
  whole = train(e, tmp_path / "whole", quiet=True)
  half = dataclasses.replace(e, steps=3)
  train(half, tmp_path / "halves", quiet=True)
  again = train(e, tmp_path / "halves", quiet=True, allow_changes=True)
  for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(again.state), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  narrow = [w.dtype == jnp.bfloat16 for w in jax.tree.leaves(whole.state.model)]
  assert any(narrow) and not all(narrow)
  assert np.isfinite(whole.evaluate()["loss"])
