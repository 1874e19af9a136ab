"""The position-wise network against closed forms in float64."""

import math

import numpy as np
import pytest

from bigtrain.models.feed_forward import ACTIVATIONS, FeedForwardConfig
from bigtrain.models.initial import Initializer, Normal
from tests.models.build import filled, normal

FORMULAS = {
  "relu": lambda x: max(x, 0.0),
  "relu2": lambda x: max(x, 0.0) ** 2,
  "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
  "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
  "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas(name):
  x = np.linspace(-4, 4, 81, dtype=np.float32)
  expected = np.vectorize(FORMULAS[name])(np.float64(x))
  np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=1e-6)


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
