"""Moments in few bits: their codes, their means, and training with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigtrain.config import Refused
from bigtrain.mesh import Mesh
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.moments import Coded, decode, encode, kept
from bigtrain.optim.sgd import SGD
from tests import packed


def values(signed):
  r = np.random.default_rng(0)
  x = (r.normal(size=(16, 64)) * np.exp(r.normal(size=(16, 64)))).astype(np.float32)
  return x if signed else x**2


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_one_of_the_two_nearest_and_right_in_the_mean(signed):
  x = values(signed)
  ratio = 2 ** (16 / 126) if signed else 2 ** (24 / 254)
  found = [decode(encode(x, jax.random.key(i), signed=signed)) for i in range(400)]
  large = np.abs(x) > np.abs(x).max(1, keepdims=True) * 2.0**-15
  off = np.array(found[0] / x)[large]
  assert off.min() > 1 / ratio - 1e-4 and off.max() < ratio + 1e-4
  mean = np.mean(found, axis=0)
  assert abs((mean - x)[large].sum()) < 1e-3 * np.abs(x).sum()
  assert np.abs(mean / x - 1)[large].max() < 5 * (ratio - 1) / 2 / np.sqrt(400)


def test_zero_stays_zero_and_no_mean_of_squares_becomes_it():
  x = jnp.array([[0.0, 1e-30, 1.0], [0.0, 0.0, 0.0]])
  for i in range(5):
    back = decode(encode(x, jax.random.key(i), signed=False))
    np.testing.assert_array_equal(back[:, 0], 0)
    assert back[0, 1] > 0 and back[0, 2] == 1 and not back[1].any()


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_slow_mean_follows_although_each_change_is_below_the_smallest_step(moments):
  """From 1 towards 0 by 0.999: after 700 updates it is at a half, not where it was."""
  transformation = kept(
    moments, optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, initial_scale=1)
  )
  params = {"w_DF": jnp.zeros((64, 64))}
  update = jax.jit(lambda s: transformation.update(params, s, params)[1])
  state = transformation.init(params)
  for _ in range(700):
    state = update(state)
  nu = state.state.nu["w_DF"]
  nu = decode(nu) if isinstance(nu, Coded) else nu.astype(jnp.float32)
  assert float(nu.mean()) == pytest.approx(0.999**700, rel=0.05)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_state_is_narrow_lies_as_its_parameters_do_and_is_the_same_on_a_mesh(moments):
  optimizer = dataclasses.replace(packed.ADAMW, moments=moments, average=None)
  e = packed.experiment(optimizer=optimizer, mesh=Mesh(data=2, fsdp=2, tensor=2))
  mesh, program, _ = packed.compiled(e)
  with packed.in_mesh(mesh):
    state = program.abstract()
  width = {"bfloat16": 2, "int8": 1}[moments]
  is_coded = lambda x: isinstance(x, Coded)
  stored = [
    x.code if is_coded(x) else x for x in jax.tree.leaves(state.optimizer, is_leaf=is_coded)
  ]
  large = lambda leaves: [x for x in leaves if x.size > 500]
  assert large(stored) and {x.dtype.itemsize for x in large(stored)} == {width}
  specs = lambda leaves: [x.sharding.spec for x in large(leaves)]
  assert specs(stored) == 2 * specs(jax.tree.leaves(state.model))
  start = packed.start(e)
  _, metrics = packed.run(e, start)
  _, wanted = packed.run(e, start, meshed=False)
  for got, want in zip(metrics, wanted, strict=True):
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)


def test_where_nothing_is_kept_low_moments_are_refused():
  for optimizer in (SGD(lr=1, momentum=0.0, moments="int8"), Adafactor(lr=1, moments="bfloat16")):
    with pytest.raises(Refused, match=r"set\s+moments to float32"):
      optimizer.check()
  with pytest.raises(Refused, match="keeps none"):
    kept("int8", optax.identity()).init({"w": jnp.zeros((2, 2))})
  assert AdamW(lr=1).moments == "float32"
