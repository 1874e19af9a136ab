"""Variables without gradients: kept beside the parameters, handed on by objectives, restored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bigtrain
from bigtrain import sharding
from bigtrain.config import config
from bigtrain.experiment import ModelConfig, ObjectiveConfig
from bigtrain.mesh import Mesh
from bigtrain.objectives import Output
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.state import combine, partition
from bigtrain.train import train
from tests import packed


class Mean(nnx.Variable):
  """The running mean of what a model has seen."""


class Centred(nnx.Module):
  def __init__(self):
    self.weight = nnx.Param(jnp.ones(()))
    self.parts = nnx.List([nnx.Dict(mean=Mean(jnp.zeros(())))])


@config
class CentredConfig(ModelConfig):
  def make(self, key):
    return Centred()


@config
class Remember(ObjectiveConfig):
  """Loss: weight * sum(token - mean). The mean then goes a tenth of the way to the batch's."""

  def __call__(self, model: Any, batch, key) -> Output:
    tokens_BT = batch["tokens"].astype(jnp.float32)
    mean = model.parts[0]["mean"]
    _, variables = partition(model)
    after = jax.tree.map(lambda old: 0.9 * old + 0.1 * jnp.mean(tokens_BT), variables)
    loss = model.weight * jnp.sum(tokens_BT - mean)
    weight = jnp.float32(tokens_BT.size)
    return Output(loss, weight, {"loss": (loss, weight)}, variables=after)


def experiment(**fields):
  e = packed.experiment(
    objective=Remember(),
    optimizer=SGD(lr=1e-3, schedule=Constant(), clip=None, momentum=0.0, average=0.5),
    mesh=Mesh(data=-1, fsdp=1),
    steps=4,
    **fields,
  )
  return dataclasses.replace(e, model=CentredConfig())


def reference(e, microbatches: int):
  """Weight, mean and losses by the formulas above, in float64."""
  weight, mean, losses = 1.0, 0.0, []
  for step in range(e.steps):
    tokens_BT = e.data.make(e.seed).batch(step * e.batch, e.batch)["tokens"].astype(np.float64)
    gradient = loss = 0.0
    for m in range(microbatches):
      part_BT = tokens_BT[m::microbatches]
      gradient += (part_BT - mean).sum() / tokens_BT.size
      mean = 0.9 * mean + 0.1 * part_BT.mean()
    losses.append(loss + weight * gradient)
    weight -= 1e-3 * gradient
  return weight, mean, losses


@pytest.mark.parametrize("microbatches", [1, 2])
def test_variables_go_from_batch_to_batch_and_into_the_checkpoint(tmp_path, microbatches):
  e = experiment(batch=16, microbatches=microbatches)
  weight, mean, losses = reference(e, microbatches)
  run = train(e, tmp_path, quiet=True)
  np.testing.assert_allclose(run.metrics["loss"], losses, rtol=1e-5)
  np.testing.assert_allclose(run.state.module.weight, weight, rtol=1e-5)
  for model in (run.weights, bigtrain.load_run(tmp_path).weights):
    np.testing.assert_allclose(model.parts[0]["mean"], mean, rtol=1e-5)
  assert "mean" not in jax.tree_util.keystr(
    [path for path, _ in jax.tree_util.tree_leaves_with_path(run.state.optimizer)]
  )


def test_a_run_that_starts_from_the_weights_of_another_has_its_variables_too(tmp_path):
  first = train(experiment(), tmp_path / "first", quiet=True)
  e = dataclasses.replace(experiment(), weights_from=str(tmp_path / "first"), steps=1)
  second = train(e, tmp_path / "second", quiet=True)
  tokens_BT = e.data.make(0).batch(0, e.batch)["tokens"]
  mean = 0.9 * first.state.module.parts[0]["mean"] + 0.1 * tokens_BT.mean()
  np.testing.assert_allclose(second.state.module.parts[0]["mean"], mean, rtol=1e-5)


def test_combine_undoes_partition():
  module = Centred()
  parameters, variables = partition(module)
  assert [len(jax.tree.leaves(x)) for x in (parameters, variables)] == [1, 1]
  assert jax.tree.structure(combine(parameters, variables)) == jax.tree.structure(module)


@config
class Forget(ObjectiveConfig):
  def __call__(self, model: Any, batch, key) -> Output:
    return Output(model.weight * 1.0, jnp.float32(1), {}, variables={})


def test_an_update_that_changes_the_tree_of_the_state_is_an_error(tmp_path):
  e = dataclasses.replace(experiment(), objective=Forget())
  with pytest.raises(TypeError, match="another tree"):
    train(e, tmp_path, quiet=True)


def test_no_sharding_is_lost_by_taking_a_module_apart():
  with jax.set_mesh(Mesh(fsdp=4, data=2).make()):
    w = nnx.Param(jnp.ones((8, 4), out_sharding=sharding.weight("DF")))
    tree = nnx.Dict(w=w, mean=Mean(jnp.zeros(3)))
    again = combine(*partition(tree))
  assert again["w"].value.sharding == w.value.sharding
