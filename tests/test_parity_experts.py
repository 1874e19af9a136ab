"""Experts on any mesh equal one device, losses, loads and balancing biases included."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from bigtrain.mesh import Mesh
from bigtrain.models.moe import BalanceLoss, Groups, MoEConfig, RouterConfig
from bigtrain.parallel.expert import Capacity, Dropless
from bigtrain.program import Program
from bigtrain.validate import validate
from tests import packed
from tests.collectives import Collective, collectives
from tests.packed import ADAMW

X, A, F = 8, 2, 28  # No other array has as many elements as a stack of D by F.
SIGMOID = {"scores": "sigmoid", "scale": 1.5, "groups": Groups(groups=4, kept=2)}
ROUTER = {"z_loss": 1e-2, "bias_rate": 1e-2, "balance_loss": BalanceLoss(factor=0.1)}


def experiment(dispatch=None, router=None, **fields):
  """One layer of experts: routers of a second one would see rounding as well."""
  e = packed.experiment(optimizer=ADAMW, **{"model": {"layers": 1, "remat": "none"}} | fields)
  e.model.pattern[0].feed_forward = MoEConfig(
    experts=X,
    top_k=A,
    hidden=F,
    shared=16,
    router=RouterConfig(**ROUTER | (router or {})),
    dispatch=dispatch or Dropless(),
  )
  validate(e, devices=8)
  return e


@pytest.fixture(scope="module")
def start():
  """A first state whose biases differ as well; it is that of every experiment here."""
  state = packed.start(experiment())
  r = np.random.default_rng(1)
  moved = jax.tree.map(lambda b: b + r.normal(0, 0.05, b.shape).astype(b.dtype), state.variables)
  return dataclasses.replace(state, variables=moved)


@pytest.fixture(scope="module")
def alone(start):
  return run(experiment(), start, meshed=False)


def run(e, start, *, meshed=True):
  """The steps of `e` from a state of an experiment whose modules hold another config."""
  structure = jax.tree.structure(Program(e, None).abstract())
  state = jax.tree.unflatten(structure, jax.tree.leaves(start))
  return packed.run(e, state, meshed=meshed)


def worst(got, wanted) -> dict[str, float]:
  """What differs by more than rounding."""
  trees = [(s.model, s.optimizer, s.variables, metrics) for s, metrics in (got, wanted)]
  return {k: d for k, d in packed.distances(*trees).items() if not d <= 1e-5}


MESHES = {
  "expert=4,fsdp=2": (Mesh(expert=4), {}),
  "expert=2,tensor=2,fsdp=2, ragged": (Mesh(expert=2, tensor=2), {"exchange": "ragged"}),
}
MORE = {
  "data=2,expert=4": (Mesh(data=2, expert=4, fsdp=1), {}),
  "expert=4,fsdp=2, ragged": (Mesh(expert=4), {"exchange": "ragged"}),
  "fsdp=4,tensor=2": (Mesh(fsdp=4, tensor=2), {}),
}


@pytest.mark.parametrize(("mesh", "dispatch"), MESHES.values(), ids=MESHES)
def test_five_steps_equal_a_single_device(mesh, dispatch, start, alone):
  assert worst(run(experiment(Dropless(**dispatch), mesh=mesh), start), alone) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "dispatch"), MORE.values(), ids=MORE)
def test_five_steps_equal_a_single_device_on_more_meshes(mesh, dispatch, start, alone):
  assert worst(run(experiment(Dropless(**dispatch), mesh=mesh), start), alone) == {}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["context", "sequence"])
def test_rows_that_are_cut_equal_a_single_device(axis, start):
  cut = {"expert": 2, "tensor": 2, "sequence": True} if axis == "sequence" else {"expert": 2}
  cut |= {"context": 2} if axis == "context" else {}
  data = packed.Packed(seq=12)  # Which the axis divides.
  wanted = run(experiment(data=data), start, meshed=False)
  assert worst(run(experiment(data=data, mesh=Mesh(**cut)), start), wanted) == {}


@pytest.mark.slow
@pytest.mark.parametrize("router", [SIGMOID, {"normalized": False}], ids=["sigmoid", "plain"])
def test_other_routers_equal_a_single_device(router, start):
  mesh = Mesh(expert=2, tensor=2)
  got = run(experiment(router=router, mesh=mesh), start)
  assert worst(got, run(experiment(router=router), start, meshed=False)) == {}


@pytest.mark.slow
def test_what_a_full_expert_leaves_out_is_the_same_on_a_mesh(start):
  tight = Capacity(factor=0.7)
  got = run(experiment(tight, mesh=Mesh(expert=2, tensor=2)), start)
  wanted = run(experiment(tight), start, meshed=False)
  assert worst(got, wanted) == {}
  assert all(0.05 < metrics["overflow"] < 0.5 for metrics in wanted[1])


@pytest.mark.slow
def test_microbatches_equal_the_whole_batch_where_rows_are_balanced(start):
  """What is dropped included, by elements, by rows and of attention's weights."""
  router, one = {"balance_loss": BalanceLoss(factor=0.1, over="row")}, {"layers": 1}
  mesh = Mesh(fsdp=4, tensor=2)  # Of 8 devices, with shards that two microbatches can fill.
  e, parts = (experiment(router=router, microbatches=n, model=one, mesh=mesh) for n in (1, 2))
  assert e.model.dropout and e.model.pattern[0].attention.dropout
  wanted = run(e, start, meshed=False)
  assert worst(run(parts, start, meshed=False), wanted) == {}


def test_the_run_that_is_compared_is_uneven_and_moves_biases(start, alone):
  state, metrics = alone
  assert all(m["load_max"] > 1.2 and m["overflow"] == 0 for m in metrics)
  (before,), (after,) = (jax.tree.leaves(s.variables) for s in (start, state))
  moved = np.abs(after - before) / 1e-2
  np.testing.assert_allclose(moved, np.round(moved), atol=1e-3)  # Steps of one size,
  assert moved.max() == pytest.approx(5, abs=1e-3)  # and for some expert always one way.


def test_experts_stay_where_they_are_and_their_gradients_are_scattered():
  mesh, _, step = packed.compiled(experiment(mesh=Mesh(expert=4)))
  found = Counter(collectives(step, mesh))
  own = X // 4 * packed.D * F  # Elements of each of the three kinds of matrices on a device.
  assert found[Collective("all-gather", ("fsdp",), own)] == 3
  assert found[Collective("reduce-scatter", ("fsdp",), own // 2)] == 3
  slots = 4 * A * packed.T  # For what each of four devices could send; a row each.
  travelled = {c: n for c, n in found.items() if c.kind == "all-to-all"}
  # Rows there and back, and their gradients; factors there, and theirs back.
  assert sum(n * c.elements for c, n in travelled.items()) == slots * (4 * packed.D + 2)
  assert {c.axes for c in travelled} == {("expert",)}
  scores = packed.B * packed.T * X
  assert not any(c.kind == "all-gather" and c.elements == scores for c in found)
  moved = {c for c in found if c.elements >= own // 2 and "expert" in c.axes}
  dense = {c for c in moved if c.elements in (own, own // 2, X * packed.D * F)}
  assert not dense, "an expert's matrices, or their gradients, travel along the axis"
