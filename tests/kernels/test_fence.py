"""Fences are the identity, in values and gradients, where they are in force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.kernels import fence
from bigtrain.mesh import Mesh
from bigtrain.models import position
from bigtrain.models.position import Rotary, rotate


@pytest.mark.parametrize("function", [fence.fence, fence.gradient_fence])
def test_a_fence_changes_no_value_and_no_gradient(function, monkeypatch):
  monkeypatch.setattr(fence.mesh, "platform", lambda: "tpu")
  x, w_DF = jnp.arange(6.0), jax.ShapeDtypeStruct((2048, 4096), jnp.float32)
  fenced = lambda x: function(x, w_DF, "DF")
  gradient = jax.grad(lambda x: jnp.sin(fenced(x) * 2 + fenced(x)).sum())
  assert "optimization_barrier" in str(jax.make_jaxpr(gradient)(x))
  np.testing.assert_allclose(fenced(x), x)
  np.testing.assert_allclose(gradient(x), 3 * np.cos(3 * np.arange(6.0)), rtol=1e-6)


def test_a_fence_is_in_force_where_the_weight_on_a_device_takes_half_of_its_vector_memory(
  monkeypatch,
):
  monkeypatch.setattr(fence.mesh, "platform", lambda: "tpu")

  def fenced(*shape, dims):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    made = jax.make_jaxpr(lambda x: fence.fence(x, w, dims))(jnp.zeros(1, jnp.bfloat16))
    return "optimization_barrier" in str(made)

  assert fenced(4096, 4096, dims="DF") and not fenced(4096, 4095, dims="DF")
  with jax.set_mesh(Mesh(fsdp=4, tensor=2).make(jax.devices())):
    assert fenced(4096, 8192, dims="DF") and not fenced(4096, 8190, dims="DF")
  monkeypatch.setattr(fence.mesh, "device_kind", lambda: "TPU v5 lite")
  assert fenced(8192, 4096, dims="FD") and not fenced(8191, 4096, dims="FD")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradient_of_a_rotation_is_that_of_its_formula(platform, monkeypatch):
  monkeypatch.setattr(position, "platform", lambda: platform)
  x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
  positions, w = jnp.array([[0, 5, 9]]), jax.random.normal(jax.random.key(1), x.shape)
  found = jax.grad(lambda x: (w * rotate(Rotary(theta=10.0), x, positions, 0.5)).sum())(x)
  angle = np.asarray(positions)[0, :, None, None] * 10.0 ** (-np.arange(0, 4, 2) / 4)
  a, b = np.split(np.asarray(w, np.float64), 2, axis=-1)
  cos, sin = 0.5 * np.cos(angle), 0.5 * np.sin(angle)
  want = np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
