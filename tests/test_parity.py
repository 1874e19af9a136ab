"""A mesh changes where numbers are computed, not which: the gate proves it, and itself by faults."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import pytest

from bigtrain import cli, sharding
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.kernels import cross_entropy
from bigtrain.mesh import Mesh
from bigtrain.models import attention, norm
from bigtrain.optim import clip
from bigtrain.parity import shrink
from bigtrain.program import Program
from bigtrain.validate import validate
from tests import families, packed
from tests.families import OPTIMIZERS, STUDIES

# The one place where an axis is added when its implementation lands.
AXES = ("slices", "data", "fsdp", "tensor")
WIDTH = 3  # Axes of a mesh here: eight devices.


def mesh_of(axes) -> Mesh:
  sizes = dict.fromkeys(("fsdp", *axes), 1) | dict.fromkeys(axes, 2)
  sequence = sizes.pop("sequence", 1) > 1  # It stands for `tensor`.
  return Mesh(**sizes | ({"tensor": 2, "sequence": True} if sequence else {}))


def covering(axes, width: int) -> list[tuple[str, ...]]:
  """Few sets of so many axes, with every pair of axes in one of them."""
  pairs = lambda some: set(itertools.combinations(some, 2)) - {("tensor", "sequence")}
  left, found = pairs(axes), []
  while left:
    best = max(itertools.combinations(axes, width), key=lambda some: len(pairs(some) & left))
    found.append(best)
    left -= pairs(best)
  return found


MESHES = covering(AXES, WIDTH)
# Every pair of axes on the first family, and every other family and optimizer on one mesh.
FAST = [("gpt2", axes) for axes in MESHES] + [("mlp", MESHES[-1])]
SLOW = [*itertools.product(STUDIES.keys(), MESHES), *itertools.product(STUDIES, [("tensor",)])]


def named(cases, **marks):
  return [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[-1])}", **marks) for case in cases]


@pytest.mark.parametrize(
  ("family", "axes"), [*named(FAST), *named(set(SLOW) - set(FAST), marks=pytest.mark.slow)]
)
def test_five_steps_on_a_mesh_equal_those_of_one_device(family, axes):
  report = families.check(families.small(family, mesh_of(axes)), jax.devices())
  assert report.equal, report.verdict()
  assert_says_something(report)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_of_every_optimizer_equal_those_of_one_device(optimizer):
  report = families.check(families.small("llama", mesh_of(MESHES[-1]), optimizer), jax.devices())
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


def test_every_pair_of_axes_is_in_a_mesh_that_the_fast_tests_compare():
  compared = {pair for _, axes in FAST for pair in itertools.combinations(axes, 2)}
  assert compared >= set(itertools.combinations(AXES, 2)) - {("tensor", "sequence")}


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

  def planted(c, x_BTKH, positions_BT):
    half = x_BTKH.shape[1] // 2
    return rotate(c, x_BTKH, positions_BT - half * (jnp.arange(2 * half) >= half))

  monkeypatch.setattr(attention, "rotate", planted)


def own_dropout(monkeypatch):
  """Every device draws bits for its own rows."""

  def planted(x, rate, key, dims=None):
    def local(x, key):
      key = jax.random.fold_in(key, jax.lax.axis_index("data"))
      keep = jax.random.bernoulli(key, 1 - rate, x.shape)
      return jnp.where(keep, x / (1 - rate), 0)

    if key is None or (isinstance(rate, float) and rate == 0.0):
      return x
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(local, in_specs=(spec, jax.P()), out_specs=spec)(x, key)

  monkeypatch.setattr(sharding, "dropout", planted)


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


FAULTS = {
  missing_psum: ("gradient", "embed_VD"),
  scaled_gradient: ("gradient", "transformer.01.feed_forward.down_FD"),
  wrong_rotation: ("output", "transformer.00.attention"),
  own_dropout: ("output", "transformer.00.attention"),
  norm_of_a_shard: ("output", "transformer.00.attention"),
  unsummed_norm: ("update", ""),
  # Room for two more, once `plain` has experts: a token that the exchange drops on one shard must
  # show as ("output", "transformer.00.feed_forward"), and a router whose logits or balance are those
  # of one shard as the same, or, if it is the gradient alone, as ("gradient", "...router...").
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_and_named(fault, monkeypatch):
  e = families.plain()
  families.reference(e)  # Without the fault.
  fault(monkeypatch)
  report = families.check(e, jax.devices()[:4])
  kind, name = FAULTS[fault]
  said, first = report.first()
  assert not report.equal
  assert (first.kind, first.name.rpartition("/")[2].startswith(name)) == (kind, True), said
  assert first.difference > 100 * first.allowed, said
  if kind == "gradient":  # Nothing but what the fault touches.
    assert {t.name.rpartition(".")[2] for t in report.different()} == {name.rpartition(".")[2]}


def test_without_a_fault_the_same_experiment_is_equal():
  report = families.check(families.plain(), jax.devices()[:4])
  assert report.equal, report.verdict()
  assert report.first() is None
