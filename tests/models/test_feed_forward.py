"""The position-wise network against closed forms in float64."""

import numpy as np
import pytest

from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer, Normal
from tests.models.build import filled, normal


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_network_equals_its_formula(gated, bias):
  c = FeedForwardConfig(hidden=12, activation="silu", gated=gated, bias=bias)
  network = filled(lambda key: c.make(8, Initializer(Normal(), 1), key))
  x = normal(2, 3, 8)
  weight = lambda name: np.float64(getattr(network, name)[...])
  product = lambda x, w, b: x @ weight(w) + (weight(b) if bias else 0.0)
  up = product(np.float64(x), "up_DF", "up_bias_F")
  silu = lambda x: x / (1 + np.exp(-x))
  hidden = silu(product(np.float64(x), "gate_DF", "gate_bias_F")) * up if gated else silu(up)
  expected = product(hidden, "down_FD", "down_bias_D")
  np.testing.assert_allclose(network(x), expected, atol=1e-5)
