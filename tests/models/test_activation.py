"""Activations against closed forms in float64."""

import math
from typing import get_args

import jax
import numpy as np
import pytest

from bigtrain.models.activation import Activation, ActivationName
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer, Normal

FORMULAS = {
  "relu": lambda x: max(x, 0.0),
  "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
  "prelu": lambda x: x if x > 0 else 0.25 * x,
  "elu": lambda x: x if x > 0 else math.exp(x) - 1,
  "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
  "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
  "silu": lambda x: x / (1 + math.exp(-x)),
  "relu2": lambda x: max(x, 0.0) ** 2,
  "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
  "tanh": math.tanh,
}
INIT = Initializer(Normal(), 1)
X = np.linspace(-4, 4, 81, dtype=np.float32)


@pytest.mark.parametrize("name", get_args(ActivationName))
def test_activations_equal_their_formulas(name):
  expected = np.vectorize(FORMULAS[name])(np.float64(X))
  np.testing.assert_allclose(Activation(name, 81, INIT)(X), expected, atol=1e-6)


def test_prelu_learns_a_slope_for_each_unit_which_the_others_do_not_have():
  slopes = lambda gradient: gradient.negative_scale_F[...]
  gradient = jax.grad(lambda activation: activation(X).sum())(Activation("prelu", 81, INIT))
  np.testing.assert_allclose(slopes(gradient), np.minimum(X, 0), atol=1e-6)
  assert not jax.tree.leaves(Activation("relu", 81, INIT))


def test_a_network_has_one_slope_for_each_hidden_unit():
  c = FeedForwardConfig(hidden=12, activation="prelu")
  network = c.make(8, INIT, jax.random.key(0))
  assert network.activation.negative_scale_F.shape == (12,)
