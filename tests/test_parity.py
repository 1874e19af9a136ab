"""A mesh changes where numbers are computed, not which: so says the gate, which faults prove."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.config import Refused
from bigtrain.kernels import cross_entropy
from bigtrain.load import load
from bigtrain.mesh import OTHER_NAMES, Mesh
from bigtrain.models import attention, moe, norm, transformer
from bigtrain.optim import clip
from bigtrain.parallel import expert
from bigtrain.parallel.expert import Capacity, Dropless
from bigtrain.parity import shrink
from bigtrain.parity.report import Tensor
from bigtrain.parity.shrink import small_mesh
from bigtrain.program import Program
from bigtrain.validate import validate
from tests import families, packed
from tests.families import OPTIMIZERS, STUDIES

# The one place where an axis is added when its implementation lands.
AXES = (
  "pipeline",
  "context",
  "expert",
  "tensor",
  "fsdp",
  "sequence",
  "ulysses",
  "data",
  "slices",
)
CUTS = {"context", "ulysses", "sequence"}
# Two names of one field of Mesh.
APART = {("tensor", "sequence"), ("context", "ulysses")}
WIDTH = 3  # Axes of a mesh here: eight devices.


def mesh_of(axes) -> Mesh:
  sizes = dict.fromkeys(("fsdp", *axes), 1) | dict.fromkeys(axes, 2)
  for other, axis in OTHER_NAMES.items():
    if sizes.pop(other, 1) > 1:
      sizes |= {axis: 2, other: True}
  return Mesh(**sizes)


def pairs(axes) -> set[tuple[str, str]]:
  return set(itertools.combinations(axes, 2)) - APART


def covering(axes, width: int) -> list[tuple[str, ...]]:
  """Few sets of so many axes, with every pair of axes in one of them."""
  left, found = pairs(axes), []
  possible = [
    some
    for some in itertools.combinations(axes, width)
    if len(pairs(some)) == width * (width - 1) / 2
  ]
  while left:
    best = max(possible, key=lambda some: len(pairs(some) & left))
    found.append(best)
    left -= pairs(best)
  return found


MESHES = covering(AXES, WIDTH)


def fits(family: str, axes) -> bool:
  """Whether the family has what these axes are for."""
  if family == "t5" and "context" in axes:
    return False  # Relative biases are not for rings.
  has_stack = family not in ("mlp", "nnx")
  has_rows = has_stack and family != "vit"
  return (has_stack or "pipeline" not in axes) and (has_rows or CUTS.isdisjoint(axes))


def cover() -> list[tuple[str, tuple[str, ...]]]:
  """Every mesh with a family: experts where the axis is, the others in turn."""
  found, left = [], list(STUDIES)
  for axes in MESHES:
    first = ["moe", "mla"] if "expert" in axes else []
    family = next(name for name in (*first, *left) if fits(name, axes))
    left = [name for name in left if name != family] + [family]
    found.append((family, axes))
  return found


COVER = cover()
# What a plain run compares; the others are slow. Together they hold every pair of axes.
FAST = [COVER[0], ("gpt2", ("tensor", "fsdp", "data")), ("nnx", ("fsdp", "data"))]
EACH = [(family, ("tensor", "fsdp", "data")) for family in STUDIES]
EACH.append(("vit", ("tensor", "fsdp")))  # Where signs of SOAP's vectors once were of rounding.
SLOW = [case for case in (*COVER, *EACH) if case not in FAST]


def named(cases, **marks):
  return [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[-1])}", **marks) for case in cases]


@pytest.mark.parametrize(("family", "axes"), [*named(FAST), *named(SLOW, marks=pytest.mark.slow)])
def test_five_steps_on_a_mesh_equal_those_of_one_device(family, axes):
  report = families.check(families.small(family, mesh_of(axes)))
  assert report.equal, report.verdict()
  assert_says_something(report)
  # Someone's own module has no taps; of all others each layer reports on any mesh.
  layers = {t.name for t in report.tensors if t.name.startswith("output/")}
  assert len(layers) >= 2 or family == "nnx"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_of_every_optimizer_equal_those_of_one_device(optimizer):
  report = families.check(families.small("llama", mesh_of(("tensor", "fsdp", "data")), optimizer))
  assert report.equal, report.verdict()
  assert_says_something(report)


def assert_says_something(report):
  """The comparison is no empty one: tensors are not zero, and nearly all are known to 1e-3."""
  gradients = [t for t in report.tensors if t.kind == "gradient"]
  assert {t.kind for t in report.tensors} >= {"loss", "gradient", "update"}
  assert {t.seen for t in report.tensors} == {5}
  sharp = [t for t in gradients if t.norm > 1e-6 and t.allowed < 1e-3]
  dull = {t.name for t in gradients} - {t.name for t in sharp}
  # A bias of keys adds the same to every score, and one before a BatchNorm is subtracted again.
  assert all("k_bias" in name or "conv" in name for name in dull), dull


def test_every_pair_of_axes_and_every_family_is_among_what_is_compared():
  cases = [*FAST, *SLOW]
  compared = {frozenset(pair) for _, axes in cases for pair in itertools.combinations(axes, 2)}
  assert compared >= set(map(frozenset, pairs(AXES)))
  assert {family for family, _ in cases} == STUDIES.keys()
  assert {axis for _, axes in FAST for axis in axes} >= {"pipeline", "context", "expert", "tensor"}


# Planted faults: each replaces production code, and what the gate names first begins so.


def missing_psum(monkeypatch):
  """The output table's gradient is that of the tokens of the first shard of the batch."""
  typed_as = cross_entropy._typed_as

  def planted(gradient, primal):
    if primal.shape[-2:] == (128, 32):
      gradient = jnp.where(jax.lax.axis_index("data") == 0, gradient, 0)
    return typed_as(gradient, primal)

  monkeypatch.setattr(cross_entropy, "_typed_as", planted)


def scaled_gradient(monkeypatch):
  """What fsdp scatters of one weight's gradient is summed twice."""
  gathered = sharding.gathered

  def planted(x, axes, over):
    if x.shape == (64, 32):  # F, D.
      x = 2 * x - jax.lax.stop_gradient(x)
    return gathered(x, axes, over)

  monkeypatch.setattr(sharding, "gathered", planted)


def wrong_rotation(monkeypatch):
  """The second half of a row, as a context shard would, counts from its own beginning."""
  rotate = attention.rotate

  def planted(c, x_BTKH, positions_BT, *scale):
    half = x_BTKH.shape[1] // 2
    return rotate(c, x_BTKH, positions_BT - half * (jnp.arange(2 * half) >= half), *scale)

  monkeypatch.setattr(attention, "rotate", planted)


def own_dropout(monkeypatch):
  """Every device draws bits for its own rows."""

  def planted(x, rate, key, dims=None):
    def local(x, key):
      key = jax.random.fold_in(key, jax.lax.axis_index("data"))
      keep = jax.random.bernoulli(key, 1 - rate, x.shape)
      return jnp.where(keep, x / (1 - rate), 0)

    off = key is None or (isinstance(rate, float) and rate == 0.0)
    if off or jax.sharding.get_abstract_mesh().empty:
      return x
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(local, in_specs=(spec, jax.P()), out_specs=spec)(x, key)

  monkeypatch.setattr(transformer, "dropout", planted)


def norm_of_a_shard(monkeypatch):
  """The mean of squares is that of half of the elements."""

  def planted(self, x_BTD):
    mean_BT1 = jnp.mean(x_BTD[..., : x_BTD.shape[-1] // 2] ** 2, -1, keepdims=True)
    return x_BTD * jax.lax.rsqrt(mean_BT1 + self.c.eps) * self.scale_D[...]

  monkeypatch.setattr(norm.RMSNorm, "__call__", planted)


def unsummed_norm(monkeypatch):
  """The gradient is clipped by the norm of one of two shards."""
  whole = clip.global_norm
  monkeypatch.setattr(clip, "global_norm", lambda tree: whole(tree) * 2**-0.5)


def dropped_token(monkeypatch):
  """Of what comes back from the experts of each device the first token is lost."""
  in_slots = expert._in_slots

  def planted(*args):
    y_RD, kept = in_slots(*args)
    return y_RD.at[0].set(0), kept

  monkeypatch.setattr(expert, "_in_slots", planted)


def unsharded_router(monkeypatch):
  """The router learns from the tokens of the first shard of the batch alone."""
  project = moe.project

  def planted(dims, x_BTD, w, *args):
    if dims != "BTD,DX->BTX" or jax.sharding.get_abstract_mesh().empty:
      return project(dims, x_BTD, w, *args)
    learns = (jnp.arange(len(x_BTD)) < len(x_BTD) // 2)[:, None, None]
    still = jax.lax.stop_gradient(w[...])
    return jnp.where(learns, project(dims, x_BTD, w), project(dims, x_BTD, still))

  monkeypatch.setattr(moe, "project", planted)


FAULTS = {
  missing_psum: ("gradient", "embed_VD"),
  scaled_gradient: ("gradient", "transformer.01.feed_forward.down_FD"),
  wrong_rotation: ("output", "transformer.00.attention"),
  own_dropout: ("output", "transformer.00"),
  norm_of_a_shard: ("output", "transformer.00.attention"),
  unsummed_norm: ("update", ""),
  dropped_token: ("output", "transformer.00"),
  unsharded_router: ("gradient", "transformer.01.feed_forward.router_DX"),
}
OF_EXPERTS = (dropped_token, unsharded_router)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_and_named(fault, monkeypatch):
  e = families.plain(experts=fault in OF_EXPERTS)
  families.reference(e)  # Without the fault.
  fault(monkeypatch)
  report = families.check(e)
  kind, name = FAULTS[fault]
  said, first = report.first()
  assert not report.equal
  assert (first.kind, first.name.rpartition("/")[2].startswith(name)) == (kind, True), said
  assert first.difference > 10 * first.allowed, said
  if kind == "gradient":  # Nothing but what the fault touches.
    assert {t.name.rpartition(".")[2] for t in report.different()} == {name.rpartition(".")[2]}


@pytest.mark.parametrize("experts", [False, True])
def test_without_a_fault_the_same_experiment_is_equal(experts):
  report = families.check(families.plain(experts=experts))
  assert report.equal, report.verdict()
  assert report.first() is None


@pytest.mark.slow
@pytest.mark.parametrize(
  ("dispatch", "axes"),
  [
    (Dropless(buffer=1.0), ("expert",)),
    (Dropless(buffer=1.0, exchange="ragged"), ("expert", "fsdp")),
    (Capacity(factor=0.7), ("expert", "context")),
    (Capacity(factor=0.7), ("sequence",)),
  ],
  ids=["slots", "ragged", "context", "sequence"],
)
def test_experts_without_room_for_all_are_no_fault_of_a_mesh(dispatch, axes):
  e, _ = load("experiments/moe.py")
  e.model.pattern[0].feed_forward.dispatch, e.mesh = dispatch, mesh_of(axes)
  report = families.check(shrink(e))
  assert report.equal, report.verdict()


def test_a_step_that_is_no_number_is_not_made_good_by_the_next():
  tensor, one = Tensor("gradient", "w"), np.ones(2)
  for got in (one, one * np.nan, one):
    tensor.see(got, one, one)
  assert not tensor.equal and tensor.step == 2


# The small copy.


def test_the_small_copy_keeps_the_structure_on_two_devices_an_axis_and_drops():
  e, _ = load("experiments/llama3.py:windowed")
  e.mesh = Mesh(data=8, fsdp=16, tensor=4)
  small = shrink(e)
  assert small.mesh == Mesh(data=2, fsdp=2, tensor=2)
  windows = [block.attention.window for block in small.model.pattern]
  assert windows == [4, 4, 4, None] and small.model.layers == 8  # Each block twice.
  assert {type(small.model), type(small.optimizer)} == {type(e.model), type(e.optimizer)}
  assert small.model.dropout == small.model.pattern[0].attention.dropout == 0.1
  assert (small.model.dtype, small.steps, small.batch) == ("float32", 5, 8)
  assert e.model.dim == 2048 and e.model.dropout == 0.0  # The experiment itself stays.


def test_a_ring_has_four_devices_where_there_is_room():
  sizes = lambda mesh: (mesh.fsdp, mesh.context, mesh.pipeline)
  assert sizes(small_mesh(Mesh(context=16))) == (2, 4, 1)
  assert sizes(small_mesh(Mesh(context=16, fsdp=64, pipeline=8))) == (2, 2, 2)
  assert sizes(small_mesh(Mesh(context=2, fsdp=1))) == (1, 2, 1)


@pytest.mark.parametrize("name", STUDIES)
def test_made_up_batches_are_ragged_in_range_and_pure(name):
  e = families.small(name, Mesh(fsdp=2))
  data = e.data.make(0)
  batch, spec = data.batch(0, 16), data.spec(16)
  assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
    k: (x.shape, x.dtype) for k, x in spec.items()
  }
  chex.assert_trees_all_equal(data.batch(4, 16, slice(2, 5)), data.batch(6, 3))
  weights = batch["weights"].reshape(16, -1)
  assert 0 < weights.mean() < 1
  if "tokens" in batch:
    assert 0 <= batch["tokens"].min() < batch["tokens"].max() < e.model.vocabulary()
    segments, positions = batch["segments"], batch["positions"]
    assert len(np.unique(segments.max(1))) > 1 and len(np.unique((segments == 0).sum(1))) > 1
    starts = np.diff(segments, prepend=0, axis=1) > 0
    assert (positions[starts] == 0).all() and (positions[(segments > 0) & ~starts] > 0).all()
  if "labels" in batch:
    assert len(np.unique(batch["labels"])) > 1 and batch["labels"].max() < (e.data.n_classes() or 2)


# What the gate leaves out.


def test_five_steps_in_a_row_of_the_compiled_step_equal_those_of_one_device():
  e = packed.experiment(optimizer=packed.ADAMW, mesh=Mesh(data=2, fsdp=2, tensor=2))
  state = packed.start(e)
  (got, metrics), (wanted, alone) = (packed.run(e, state, meshed=m) for m in (True, False))
  assert int(got.step) == e.steps and int(got.example) == e.steps * e.batch
  distances = packed.distances(
    (got.model, got.optimizer, metrics), (wanted.model, wanted.optimizer, alone)
  )
  assert {k: d for k, d in distances.items() if not d <= 1e-5} == {}
  assert alone[-1]["loss"] < alone[0]["loss"] - 0.05
  assert alone[0]["gradient_norm"] > e.optimizer.clip
  weights = [m["weight"] for m in alone]
  assert len(np.unique(weights)) > 1 and max(weights) < packed.B * packed.T


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


def test_initialisation_gives_the_same_bits_on_a_mesh():
  e = packed.experiment(mesh=Mesh(data=2, fsdp=2, tensor=2))
  alone = Program(e, None).compile_init()(jax.random.key(7))
  with jax.set_mesh(mesh := e.mesh.make()):
    spread = Program(e, mesh).compile_init()(jax.random.key(7))
  chex.assert_trees_all_equal(jax.device_get(spread), jax.device_get(alone))


def test_fewer_key_value_heads_than_the_tensor_axis_are_refused():
  e = packed.experiment(attention={"kv_heads": 4}, mesh=Mesh(fsdp=1, tensor=8))
  message = "kv_heads 4 is not divisible by 8, the mesh's tensor=8; use 8, or set .*mesh.tensor = 4"
  with pytest.raises(Refused, match=message):
    validate(e, devices=8)
