"""The convolutional network of Flax's tutorial on MNIST, as any user of Flax would write it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import bigtrain
from bigtrain.config import config
from bigtrain.interop.nnx_module import NNXModule, WithNNXModule
from bigtrain.mesh import Mesh
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from bigtrain.state import combine
from bigtrain.train import train
from tests import classes


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
