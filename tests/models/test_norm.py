"""Norms against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.models.norm import LayerNormConfig, RMSNormConfig
from tests.models.build import filled, normal


def reference(c, x, scale, bias):
  x = np.float64(x)
  if isinstance(c, LayerNormConfig):
    x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.eps) * scale + bias


@pytest.mark.parametrize(
  "c",
  [
    RMSNormConfig(eps=0.1),
    RMSNormConfig(scale=False),
    LayerNormConfig(eps=0.1),
    LayerNormConfig(bias=False),
  ],
)
def test_values_equal_numpy_with_an_eps_that_matters(c):
  norm = filled(lambda key: c.make(16))
  x = normal(2, 3, 16) + 0.5
  scale = 1.0 if norm.scale_D is None else np.float64(norm.scale_D[...])
  bias = getattr(norm, "bias_D", None)
  expected = reference(c, x, scale, 0.0 if bias is None else np.float64(bias[...]))
  np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_normalised_in_float32():
  x = jnp.asarray(normal(1, 1, 4096) + 8.0, jnp.bfloat16)
  for c in (RMSNormConfig(), LayerNormConfig()):
    y = c.make(4096)(x)
    assert y.dtype == jnp.bfloat16
    expected = reference(c, x.astype(jnp.float32), 1.0, 0.0)
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-5)  # One rounding.
