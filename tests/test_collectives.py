"""What devices send each other in a step: nothing but what the design implies.

A step that also moved an activation over fsdp, or the optimizer's state, would compute the same
numbers, and only be slow.
"""

from collections import Counter

import jax
import pytest
from jax import P

from bigtrain import sharding
from bigtrain.mesh import Mesh
from bigtrain.optim import optimizer
from tests import packed
from tests.collectives import Collective, collectives
from tests.packed import ADAMW, B, D, F, G, H, K, T, V

SMALL = 128  # Elements: a bias, a norm, a number for each token. Every weight has more.
ALL = Mesh(data=2, fsdp=2, tensor=2)


def implied(mesh: Mesh) -> Counter[Collective]:
  """All transfers of more than `SMALL` elements, by the design, on one device.

  - fsdp gathers each weight of a block in the forward pass, and once more in the backward pass,
    which computes the block again; the table it gathers once.
  - fsdp scatters the sum of each weight's gradient, of which data then adds up shards, and slices
    the sums of that; of the table twice, where it is read and where it makes the logits.
  - tensor adds up activations: two in a block's forward pass, one of them again when that is
    repeated, and two in its backward pass; and those of the embedding and before the logits.
  """
  t = mesh.tensor
  weights = [D * K * G * H // t] * 2 + [D * K * H // t] * 2 + [D * F // t] * 3
  table = V * D // t
  shards = [n // mesh.fsdp for n in [*weights, table, table]]
  found = Counter()
  if mesh.fsdp > 1:
    found.update(Collective("all-gather", ("fsdp",), n) for n in [*weights, *weights, table])
    found.update(Collective("reduce-scatter", ("fsdp",), n) for n in shards)
  for axis in ("data", "slices"):
    if getattr(mesh, axis) > 1:
      found.update(Collective("all-reduce", (axis,), n) for n in shards)
  if t > 1:
    activation = B * T * D // (mesh.data * mesh.fsdp)
    found[Collective("all-reduce", ("tensor",), activation)] = 2 + 1 + 2 + 1 + 1
  return found


def large(found: list[Collective]) -> Counter[Collective]:
  return Counter(c for c in found if c.elements > SMALL)


def experiment(mesh: Mesh):
  return packed.experiment(optimizer=ADAMW, mesh=mesh)


ACROSS = [Mesh(slices=2, fsdp=4), Mesh(slices=2, data=2, fsdp=2)]


@pytest.mark.parametrize(
  "mesh", [*packed.MESHES, *ACROSS], ids=[*packed.NAMES, "slices,fsdp", "slices,data,fsdp"]
)
def test_a_step_has_the_collectives_that_the_design_implies_and_no_other(mesh):
  devices, _, step = packed.compiled(experiment(mesh))
  found = collectives(step, devices)
  assert large(found) == implied(mesh)
  assert {c.kind for c in found if c.elements <= SMALL} <= {"all-reduce"}


def gathered(x):
  """The same array, by way of every device."""
  return jax.sharding.reshard(jax.sharding.reshard(x, P()), jax.typeof(x).sharding.spec)


def plant_in_activations(monkeypatch):
  shared = sharding.shared
  monkeypatch.setattr(sharding, "shared", lambda x: shared(gathered(x)))


def plant_in_optimizer(monkeypatch):
  scale = optimizer.optax.scale_by_adam

  def planted(*args):
    tx = scale(*args)
    update = lambda u, state, p=None: tx.update(u, jax.tree.map(gathered, state), p)
    return optimizer.optax.GradientTransformation(tx.init, update)

  monkeypatch.setattr(optimizer.optax, "scale_by_adam", planted)


@pytest.mark.parametrize("plant", [plant_in_activations, plant_in_optimizer])
def test_an_accidental_gather_is_found(plant, monkeypatch):
  plant(monkeypatch)
  devices, _, step = packed.compiled.__wrapped__(experiment(ALL))
  more = large(collectives(step, devices)) - implied(ALL)
  assert any(c.kind == "all-gather" and c.axes != ("fsdp",) for c in more)
