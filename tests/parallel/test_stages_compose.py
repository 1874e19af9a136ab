"""Stages with what else a mesh has: rows that are cut and experts within them equal one device.

Whole models are slow to compile; a plain run has them in one case of tests/test_parity.py.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import taps
from bigtrain.mesh import Mesh
from bigtrain.models.moe import BalanceLoss
from bigtrain.parallel.pipeline import Pipeline
from bigtrain.validate import validate
from tests import packed, test_parity_experts
from tests.collectives import collectives

SLOW = pytest.mark.slow
CALM = {"dropout": 0.0, "window": 6}  # Attention over rows that are cut drops no weights.
STAGES = {"layers": 4, "remat": "full"}


def dense(mesh: Mesh, **schedule):
  model = STAGES | {"pipeline": Pipeline(**schedule), "drop_path": 0.1}
  data = packed.Packed(seq=16)
  return packed.experiment(
    optimizer=packed.ADAMW, mesh=mesh, steps=2, data=data, attention=CALM, model=model
  )


def experts(mesh: Mesh, **schedule):
  """Balance losses by row: over a batch they would be of each microbatch by itself."""
  fields = {"steps": 2, "data": packed.Packed(seq=16), "attention": CALM}
  router = {"balance_loss": BalanceLoss(factor=0.1, over="row")}
  model = STAGES | {"pipeline": Pipeline(**schedule)}
  e = test_parity_experts.experiment(router=router, model=model, **fields)
  return dataclasses.replace(e, mesh=mesh)  # Which one layer alone would not divide.


CASES = {
  "experts, a ring": (experts, Mesh(pipeline=2, fsdp=1, expert=2, context=2), SLOW),
  "a ring": (dense, Mesh(pipeline=2, fsdp=2, context=2), SLOW),
  "an exchange": (dense, Mesh(pipeline=2, fsdp=2, context=2, ulysses=True), SLOW),
  "sequence": (dense, Mesh(pipeline=2, fsdp=2, tensor=2, sequence=True), SLOW),
  "experts on each": (experts, Mesh(pipeline=2, fsdp=4), SLOW),
  "experts, tensor": (experts, Mesh(pipeline=2, fsdp=1, expert=2, tensor=2), SLOW),
}


@pytest.mark.parametrize(
  ("study", "mesh"),
  [pytest.param(study, mesh, id=name, marks=marks) for name, (study, mesh, marks) in CASES.items()],
)
def test_two_updates_equal_one_device_and_stages_send_each_other_little(study, mesh):
  rows = 8 // (mesh.fsdp * mesh.expert * mesh.context) * mesh.context
  e = study(mesh, microbatches=4 if rows >= 4 else 2, rounds=2)
  validate(e, devices=8)
  state = packed.start(e)
  got, wanted = packed.run(e, state), packed.run(e, state, meshed=False)
  packed.assert_equal(e, got, wanted)
  variables = packed.distances(got[0].variables, wanted[0].variables)
  assert all(d <= 1e-5 for d in variables.values()), variables
  devices, _, step = packed.compiled(e)
  microbatch = packed.B * 16 * packed.D // 4
  large = [c for c in collectives(step, devices) if c.elements >= microbatch // 4]
  table = packed.V * packed.D // mesh.tensor
  across = {c for c in large if "pipeline" in c.axes and c.elements * 8 % table}
  assert {c.kind for c in across} == {"collective-permute"}, across


def test_sums_of_microbatches_are_added_and_those_of_rows_put_in_order():
  found = {
    "sum:load/a": jnp.arange(6.0).reshape(2, 3, 1),  # Two microbatches, three layers.
    "sum:row:loss/a": jnp.array([[[2.0, 0.0]], [[3.0, 1.0]]]),
    "output/a": jnp.array([[1.0], [3.0]]),
  }
  joined = taps.joined(found, jnp.array([[2, 0], [3, 1]]))
  np.testing.assert_array_equal(joined["sum:load/a"], [[3.0], [5.0], [7.0]])
  np.testing.assert_array_equal(joined["sum:row:loss/a"], [[0.0, 1.0, 2.0, 3.0]])
  np.testing.assert_array_equal(joined["output/a"], [2.0])
