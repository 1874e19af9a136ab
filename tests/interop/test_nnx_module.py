"""The convolutional network of Flax's tutorial on MNIST, as any user of Flax would write it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import bigtrain
from bigtrain.config import Refused, config
from bigtrain.data.datasets import Synthetic
from bigtrain.data.features import FeatureData
from bigtrain.interop.nnx_module import Live, NNXModule, WithNNXModule, _streams
from bigtrain.mesh import Mesh
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from bigtrain.state import combine
from bigtrain.train import train
from bigtrain.validate import validate
from tests import classes, toys


class CNN(nnx.Module):
  def __init__(self, dropout: float, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(classes.CHANNELS, 8, kernel_size=(3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(8, rngs=rngs)
    self.dropout1 = nnx.Dropout(dropout, rngs=rngs)
    self.conv2 = nnx.Conv(8, 8, kernel_size=(3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(8, rngs=rngs)
    self.linear1 = nnx.Linear(2 * 2 * 8, 16, rngs=rngs)
    self.dropout2 = nnx.Dropout(dropout, rngs=rngs)
    self.linear2 = nnx.Linear(16, classes.C, rngs=rngs)

  def __call__(self, x):
    x = nnx.avg_pool(nnx.relu(self.norm1(self.dropout1(self.conv1(x)))), (2, 2), strides=(2, 2))
    x = nnx.avg_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), strides=(2, 2))
    x = nnx.relu(self.dropout2(self.linear1(x.reshape(len(x), -1))))
    return self.linear2(x)


@config
class CNNConfig(NNXModule):
  dropout: float = 0.1

  def module(self, rngs):
    return CNN(self.dropout, rngs)


def experiment(**fields):
  # Not Adam: a bias before a BatchNorm has no gradient but rounding, which it would enlarge.
  optimizer = SGD(lr=0.1, schedule=Constant())
  fields = {"optimizer": optimizer, "objective": WithNNXModule()} | fields
  return classes.experiment(CNNConfig(), **fields)


def test_parameters_lie_over_fsdp_by_their_largest_dim_and_begin_with_the_same_bits():
  e = experiment(mesh=Mesh(data=4, fsdp=2))
  alone = Program(e, None).compile_init()(jax.random.key(0))
  with jax.set_mesh(mesh := e.mesh.make()):
    spread = Program(e, mesh).compile_init()(jax.random.key(0))
  shards = lambda w: w[...].sharding.shard_shape(w.shape)
  parameters = spread.model.parameters
  assert shards(parameters["linear1"]["kernel"]) == (16, 16)
  assert shards(parameters["linear2"]["bias"]) == (classes.C,)  # 7 classes: on both.
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(alone))


def test_running_means_are_kept_restored_and_used_in_evaluation(tmp_path):
  run = train(experiment(), tmp_path, quiet=True)
  again = bigtrain.load_run(tmp_path)
  mean = lambda module: np.asarray(module.variables["norm1"]["mean"][...])
  assert np.abs(mean(run.weights)).max() > 1e-3
  np.testing.assert_array_equal(mean(again.weights), mean(run.weights))
  before = again.evaluate()
  assert before == pytest.approx(run.evaluate())
  state = again.state
  other = jax.tree.map(lambda v: v + 1.0, state.variables)
  again.state = dataclasses.replace(state, variables=other)
  assert again.evaluate()["loss"] != pytest.approx(before["loss"], rel=1e-3)


def test_dropout_follows_the_key_and_evaluation_has_none():
  e = experiment()
  state = Program(e, None).init(jax.random.key(0))
  model = combine(state.model, state.variables)
  batch, objective = e.data.make(0).batch(0, 16), WithNNXModule()
  loss = lambda key: float(objective(model, batch, key).loss_sum)
  assert loss(jax.random.key(1)) == loss(jax.random.key(1)) != loss(jax.random.key(2))
  assert loss(None) == loss(None)
  assert not [
    x for x in jax.tree.leaves(state) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  ]


class Scores(nnx.Module):
  """A product alone, with a dropout that shows which numbers it drew."""

  def __init__(self, classes: int, rngs: nnx.Rngs):
    self.linear = nnx.Linear(100, classes, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.dropout(x))


@config
class ScoresConfig(NNXModule):
  last: int

  def module(self, rngs):
    return Scores(self.last, rngs)


def test_a_module_with_another_number_of_outputs_than_classes_is_refused():
  data = FeatureData(source=Synthetic())
  e = toys.experiment(model=ScoresConfig(last=10), data=data, objective=WithNNXModule())
  validate(e)
  with pytest.raises(Refused, match="gives 5 scores but the data has 10 classes; make its last"):
    validate(dataclasses.replace(e, model=ScoresConfig(last=5)))
  with pytest.raises(Refused, match=r"cannot take inputs of shape \(1, 7\)"):
    validate(dataclasses.replace(e, data=FeatureData(source=Synthetic(features=7, classes=5))))


def test_a_modules_streams_are_none_of_the_keys_that_an_objective_splits_off():
  key = jax.random.key(0)
  apart = ScoresConfig(last=3).make(key)
  own = [k.get_value() for _, k in nnx.to_flat_state(_streams(apart.streams, key)) if k.ndim == 0]
  own = [k for k in own if jax.dtypes.issubdtype(k.dtype, jax.dtypes.prng_key)]
  live = Live(apart, key)
  live(np.zeros((2, 100), np.float32))
  bits = lambda keys: {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
  split = [k for n in range(2, 5) for k in jax.random.split(key, n)]
  assert own and not bits([*own, live.key]) & bits(split)
