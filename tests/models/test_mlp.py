"""The dense network against its formula in float64."""

import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.models.count import count_parameters
from bigtrain.models.initial import Mup
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.norm import RMSNormConfig
from tests.models.build import filled, normal


def worked_example(**fields):
  return MLPConfig(**{"inputs": 100, "hidden": (128, 128), "classes": 10} | fields)


def value(parameter):
  return np.float64(parameter[...])


def test_the_worked_example_has_its_shape():
  c = worked_example()
  assert count_parameters(c) == 100 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
  assert c.flops() == 6 * (100 * 128 + 128 * 128 + 128 * 10)
  assert [letters for letters, _, _ in c.layers()] == ["ID", "DF", "FC"]
  assert c.dims() == {"hidden.0": ("D", 128), "hidden.1": ("F", 128)}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", [None, RMSNormConfig()])
def test_logits_equal_the_formula(residual, norm):
  c = MLPConfig(inputs=12, hidden=(8, 8, 6), classes=3, residual=residual, norm=norm)
  network, images = filled(c.make), normal(4, 3, 4, 1)
  x = np.float64(images).reshape(4, 12)
  *hidden, last = network.layers
  for i, layer in enumerate(hidden):
    y = x @ value(layer.weight) + value(layer.bias)
    if norm is not None:
      rms = np.sqrt((y**2).mean(-1, keepdims=True) + norm.eps)
      y = y / rms * value(layer.norm.scale_D)
    y = np.maximum(y, 0)
    x = x + y if residual and i == 1 else y  # The one layer as wide as the one before it.
  expected = x @ value(last.weight) + value(last.bias)
  np.testing.assert_allclose(network(images), expected, atol=1e-5)


def test_initial_variance_is_that_of_he_and_biases_are_zero():
  network = jax.jit(worked_example(inputs=784).make)(jax.random.key(0))
  for layer in network.layers:
    fan_in = layer.weight.shape[0]
    assert value(layer.weight).std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.05)
    assert not value(layer.bias).any()


def test_dropout_is_of_training_and_of_every_hidden_layer():
  network, x = filled(worked_example(dropout=0.5).make), normal(4, 100)
  apply = lambda key: np.asarray(network.logits(x, key))
  np.testing.assert_array_equal(apply(None), network(x))
  a, b = apply(jax.random.key(0)), apply(jax.random.key(1))
  assert np.abs(a - b).min() > 1e-3 and np.abs(a - apply(None)).max() > 1e-3


def test_rows_of_another_length_are_refused_with_the_one_to_set():
  network = filled(worked_example().make)
  said = r"examples have 784 numbers, \(28, 28, 1\); set experiment\.model\.inputs = 784"
  with pytest.raises(Refused, match=said):
    network(normal(2, 28, 28, 1))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"hidden": (128, 0)}, r"hidden\.1 is 0"),
    ({"classes": 0}, "classes is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"hidden": (), "init": Mup(base=8)}, "Mup is about hidden layers"),
    ({"hidden": (64, 32), "residual": True}, "no two neighbours are equally wide"),
  ],
)
def test_impossible_values_are_refused(fields, message):
  with pytest.raises(Refused, match=message):
    worked_example(**fields).check()
