"""What devices send each other where rows are cut: what test_collectives.py has, and this.

The sizes of arrays are those of tests/packed.py, with rows of 16 tokens.
"""

from collections import Counter

import pytest

from bigtrain.mesh import Mesh
from tests import packed
from tests.collectives import Collective, collectives
from tests.packed import ADAMW, B, D, F, G, H, K, V
from tests.test_collectives import large

pytestmark = pytest.mark.slow

T = 16
WEIGHTS = [D * K * G * H] * 2 + [D * K * H] * 2 + [D * F] * 3
TABLE = V * D


def found(mesh: Mesh) -> Counter[Collective]:
  data, attention = packed.Packed(seq=T), {"dropout": 0.0}
  e = packed.experiment(optimizer=ADAMW, mesh=mesh, data=data, attention=attention)
  devices, _, step = packed.compiled(e)
  return large(collectives(step, devices))


def test_a_ring_passes_keys_and_values_and_context_is_fsdp_for_the_weights():
  """Two devices: one pass forward, one backward, which the repeated forward pass shares; and the
  gradients of keys and values, once to the neighbour and once home."""
  everything = ("data", "fsdp", "context")
  wanted = Counter({Collective("collective-permute", everything, (B // 4) * (T // 2) * K * H): 8})
  for n in [*WEIGHTS, *WEIGHTS, TABLE]:
    wanted[Collective("all-gather", ("context",), n // 2)] += 1
    wanted[Collective("all-gather", ("fsdp",), n)] += 1
  for n in [*WEIGHTS, TABLE, TABLE]:
    wanted[Collective("reduce-scatter", ("fsdp",), n // 2)] += 1
    wanted[Collective("reduce-scatter", ("context",), n // 4)] += 1
    wanted[Collective("all-reduce", ("data",), n // 4)] += 1
  assert found(Mesh(data=2, fsdp=2, context=2)) == wanted


def test_sequence_gathers_what_enters_products_and_scatters_what_comes_out():
  """Where tensor has one all-reduce: two a block forward, one of them in the repeated pass, two
  backward, one each of embedding and loss. Gathers are as many, and one more of the repeated pass,
  whose products need their inputs; and two are of the shift."""
  activation = (B // 4) * T * D
  wanted = Counter()
  wanted[Collective("all-gather", ("sequence",), activation)] = 2 + 2 + 2 + 1 + 1 + 2
  wanted[Collective("reduce-scatter", ("sequence",), activation // 2)] = 2 + 1 + 2 + 1 + 1
  for n in [*WEIGHTS, *WEIGHTS, TABLE]:
    wanted[Collective("all-gather", ("fsdp",), n // 2)] += 1
  for n in [*WEIGHTS, TABLE, TABLE]:
    wanted[Collective("reduce-scatter", ("fsdp",), n // 8)] += 1
  assert found(Mesh(fsdp=4, tensor=2, sequence=True)) == wanted
