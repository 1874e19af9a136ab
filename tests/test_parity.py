"""A mesh changes where numbers are computed, not which: every one equals a single device's."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.load import load
from bigtrain.mesh import Mesh
from bigtrain.models.initial import Mup
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from bigtrain.validate import validate
from tests import packed

# Adam divides by the size of the gradient: where that is hardly more than rounding, the rounding
# becomes the update. At eps 1e-8 a leaf differs by up to 4e-5 for that reason, at 1e-5 by 2e-6.
ADAMW = AdamW(lr=1e-2, eps=1e-5, clip=0.5, average=0.9, schedule=Cosine(warmup=2))
NESTEROV = SGD(
  lr=0.3, clip=0.5, weight_decay=0.1, nesterov=True, average=0.9, schedule=Cosine(warmup=2)
)


def assert_equal(e, got, wanted):
  (state, metrics), (state0, metrics0) = got, wanted
  assert int(state.step) == e.steps and int(state.example) == e.steps * e.batch
  distances = packed.distances(
    (state.model, state.optimizer, metrics), (state0.model, state0.optimizer, metrics0)
  )
  assert {k: d for k, d in distances.items() if not d <= 1e-5} == {}


@pytest.fixture(scope="module")
def alone():
  """The experiment, its first state, and its five steps on a single device."""
  e = packed.experiment(optimizer=ADAMW)
  state = packed.start(e)
  return state, packed.run(e, state, meshed=False)


@pytest.mark.parametrize("mesh", packed.MESHES, ids=packed.NAMES)
def test_five_steps_of_adamw_equal_a_single_device(mesh, alone):
  e = packed.experiment(optimizer=ADAMW, mesh=mesh)
  validate(e, devices=8)
  state, wanted = alone
  assert_equal(e, packed.run(e, state), wanted)


def test_five_steps_of_a_model_twice_as_wide_as_its_base_equal_a_single_device():
  init = Mup(base=packed.D // 2, head_dim=packed.H // 2)
  e = packed.experiment(optimizer=ADAMW, model={"init": init}, mesh=Mesh(fsdp=2, tensor=2, data=2))
  validate(e, devices=8)
  state = packed.start(e)
  assert_equal(e, packed.run(e, state), packed.run(e, state, meshed=False))


def test_five_steps_of_sgd_equal_a_single_device():
  e = packed.experiment(optimizer=NESTEROV, mesh=Mesh(data=2, fsdp=2, tensor=2))
  state = packed.start(e)
  assert_equal(e, packed.run(e, state), packed.run(e, state, meshed=False))


@pytest.mark.slow
def test_twenty_steps_of_the_quickstart_equal_a_single_device():
  e, _ = load("experiments/quickstart.py")
  e = dataclasses.replace(e, steps=20, batch=8, mesh=Mesh(data=2, fsdp=2, tensor=2))
  e.optimizer.schedule.warmup = 5
  state = jax.device_get(Program(e, None).compile_init()(jax.random.key(e.seed)))
  (_, metrics), (_, alone) = (packed.run(e, state, meshed=meshed) for meshed in (True, False))
  losses, wanted = ([m["loss"] for m in rows] for rows in (metrics, alone))
  np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)
  assert wanted[-1] < wanted[0] - 1


def test_the_run_that_is_compared_learns_clips_and_drops(alone):
  _, (_, metrics) = alone
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
  assert metrics[0]["gradient_norm"] > ADAMW.clip
  weights = [m["weight"] for m in metrics]
  assert len(np.unique(weights)) > 1 and max(weights) < packed.B * packed.T


def test_initialisation_gives_the_same_bits_on_a_mesh():
  e = packed.experiment(mesh=Mesh(data=2, fsdp=2, tensor=2))
  alone = Program(e, None).compile_init()(jax.random.key(7))
  with jax.set_mesh(mesh := e.mesh.make()):
    spread = Program(e, mesh).compile_init()(jax.random.key(7))
  chex.assert_trees_all_equal(jax.device_get(spread), jax.device_get(alone))


def test_fewer_key_value_heads_than_the_tensor_axis_are_refused():
  e = packed.experiment(attention={"kv_heads": 4}, mesh=Mesh(fsdp=1, tensor=8))
  message = r"kv_heads 4 is not divisible by 8, the mesh's tensor=8; use 8, or a smaller mesh"
  with pytest.raises(Refused, match=message):
    validate(e, devices=8)
