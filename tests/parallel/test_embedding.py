"""Rows of a table over devices, exchanged or looked up in the whole table, against one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.mesh import Mesh
from bigtrain.models.position import lookup
from bigtrain.parallel import embedding

B, T, V, D = 8, 4, 48, 32
MESHES = [
  Mesh(),
  Mesh(data=2, fsdp=4),
  Mesh(slices=2, data=2, fsdp=2),
  Mesh(fsdp=4, tensor=2),
  Mesh(fsdp=4, tensor=2, sequence=True),
  Mesh(fsdp=4, expert=2),
  Mesh(fsdp=2, expert=2, context=2),
  Mesh(fsdp=2, context=4, ulysses=True),
  Mesh(fsdp=4, pipeline=2),
]


def arrays():
  key_w, key_i, key_c = jax.random.split(jax.random.key(0), 3)
  ids_BT = jax.random.randint(key_i, (B, T), 0, V)
  return jax.random.normal(key_w, (V, D)), ids_BT, jax.random.normal(key_c, (B, T, D))


def looked_up(mesh: Mesh):
  """Rows, the gradient of a sum of them by the table, and the program's text."""
  w_VD, ids_BT, c_BTD = (np.asarray(a) for a in arrays())
  with jax.set_mesh(mesh.make(jax.devices())), sharding.rows(cut=mesh.context > 1):
    put = lambda a, spec: jax.device_put(
      a, jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
    )
    laid = (
      put(w_VD, sharding.weight("VD")),
      put(ids_BT, sharding.act("BT")),
      put(c_BTD, sharding.act("BTD")),
    )

    def loss(w_VD, ids_BT, c_BTD):
      x_BTD = lookup(w_VD, ids_BT, jnp.float32)
      return (x_BTD * c_BTD).sum(), x_BTD

    step = jax.jit(jax.grad(loss, has_aux=True)).lower(*laid).compile()
    gradient, x_BTD = step(*laid)
    assert gradient.sharding == laid[0].sharding
  return np.asarray(x_BTD), np.asarray(gradient), step.as_text()


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_rows_and_their_gradient_are_those_of_one_device(mesh, exchanged, monkeypatch):
  monkeypatch.setattr(embedding, "WIDE", 1 if exchanged else D + 1)
  w_VD, ids_BT, c_BTD = arrays()
  want = np.zeros((V, D))
  np.add.at(want, np.asarray(ids_BT), np.asarray(c_BTD, np.float64))
  x_BTD, gradient, text = looked_up(mesh)
  np.testing.assert_array_equal(x_BTD, np.asarray(w_VD)[np.asarray(ids_BT)])
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)
  assert bool(re.search(r" all-to-all(-start)?\(", text)) == exchanged


@pytest.mark.parametrize(("mesh", "split"), [(Mesh(), 1), (Mesh(fsdp=4, tensor=2), 2)], ids=str)
@pytest.mark.parametrize("more", [0, 2])
def test_the_table_travels_where_a_device_has_more_tokens_than_rows_of_it(
  mesh, split, more, monkeypatch
):
  monkeypatch.setattr(embedding, "WIDE", 1)
  tokens = B * T * split // 8
  monkeypatch.setattr("tests.parallel.test_embedding.V", (tokens + more) * split)
  assert ("all-to-all" in looked_up(mesh)[2]) == bool(more)
