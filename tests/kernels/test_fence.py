"""Fences are the identity, in values and gradients, where they are in force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.kernels import fence
from bigtrain.models import position
from bigtrain.models.position import Rotary, rotate


@pytest.mark.parametrize("function", [fence.fence, fence.gradient_fence])
def test_a_fence_changes_no_value_and_no_gradient(function, monkeypatch):
  monkeypatch.setattr(fence, "platform", lambda: "tpu")
  x = jnp.arange(6.0)
  loss = lambda x: jnp.sin(function(x) * 2 + function(x)).sum()
  assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(loss))(x))
  np.testing.assert_allclose(jax.grad(loss)(x), 3 * np.cos(3 * np.arange(6.0)), rtol=1e-6)


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
