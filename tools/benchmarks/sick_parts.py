"""What the configurations of sick_and_healthy.py are made of: short experiments, and faults."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from bigtrain import Checkpoints, Evaluation, Experiment, Logging
from bigtrain.config import config
from bigtrain.data.arrays import ArraySplit
from bigtrain.data.datasets import FashionMNISTSubset
from bigtrain.data.examples import Opened
from bigtrain.data.features import FeatureData
from bigtrain.experiment import Data, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from bigtrain.interop.nnx_module import NNXModule
from bigtrain.load import load
from bigtrain.models.mlp import MLPConfig
from bigtrain.objectives.classification import Classification

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def loaded(target: str) -> Experiment[Any, Any, Any, Any]:
  """An experiment of this repository."""
  return load(str(EXPERIMENTS / target))[0]


def experiment(
  model: ModelConfig, data: DataConfig, optimizer: OptimizerConfig, objective: ObjectiveConfig
) -> Experiment[Any, Any, Any, Any]:
  return Experiment(model=model, data=data, optimizer=optimizer, objective=objective, batch=1)


def mlp(data: FeatureData, optimizer: OptimizerConfig, layers: int, **fields) -> Experiment:
  """Hidden layers of 64 on that data, for 300 steps."""
  model = MLPConfig(inputs=data.features(), hidden=(64,) * layers, classes=10, **fields)
  return short(experiment(model, data, optimizer, Classification()), 300, 64)


def short(e: Experiment, steps: int = 0, batch: int = 0) -> Experiment:
  """So many steps (what it has, if 0) with records as dense as those of a run of a thousand."""
  e.steps, e.batch = steps or e.steps, batch or e.batch
  every = max(e.steps // 100, 1) if e.steps else 10
  e.logging = Logging(every=every, layers_every=10 * every, tensorboard=False)
  e.evaluation = Evaluation(every=25 * every, batch=64)
  e.checkpoints = Checkpoints(every=10**6)
  return e


class Network(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(16, rngs=rngs)
    self.conv2 = nnx.Conv(16, 16, kernel_size=(3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(16, rngs=rngs)
    self.linear = nnx.Linear(7 * 7 * 16, 10, rngs=rngs)

  def __call__(self, x):
    for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
      x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), strides=(2, 2))
    return self.linear(x.reshape(len(x), -1))


@config
class CNN(NNXModule):
  """Someone's own network, which reports nothing of itself."""

  def module(self, rngs: nnx.Rngs) -> Network:
    return Network(rngs)


@config
class Few(FashionMNISTSubset):
  """The first of its training images, all of the held-out ones."""

  examples: int

  def open(self) -> Opened:
    train, held_out = FashionMNISTSubset.open(self)
    # Images stand in order of the dataset, classes mixed.
    return Opened(ArraySplit(*train.read(np.arange(self.examples)), "few"), held_out)


@config
class Slow(DataConfig):
  """Other data, each batch of which takes so long."""

  data: DataConfig
  seconds: float

  def make(self, seed: int) -> Data:
    def late(batch, example):
      time.sleep(self.seconds)
      return batch

    return Changed(self.data.make(seed), late)


@config
class Planted(DataConfig):
  """Other data, some batches of which are noise: tokens or features that are drawn at random."""

  data: DataConfig
  batches: tuple[int, ...]  # Their numbers, which are those of the updates before them.
  batch: int  # Rows of each.

  def make(self, seed: int) -> Data:
    def spoilt(batch, example):
      if example // self.batch not in self.batches:
        return batch
      r = np.random.default_rng(example)
      if "targets" in batch:
        names, shape = ("tokens", "targets"), batch["tokens"].shape
        return batch | {n: r.integers(0, 2048, shape).astype(np.int32) for n in names}
      return batch | {"inputs": (100 * r.normal(size=batch["inputs"].shape)).astype(np.float32)}

    return Changed(self.data.make(seed), spoilt)

  def vocabulary(self) -> int | None:
    return self.data.vocabulary()

  def row_length(self) -> int | None:
    return self.data.row_length()


class Changed(Data):
  """A dataset whose training batches go through `change(batch, example)`."""

  def __init__(self, data: Data, change: Callable[[dict, int], dict]):
    self.data, self.change = data, change

  def spec(self, size):
    return self.data.spec(size)

  def batch(self, example, size, rows=None):
    return self.change(self.data.batch(example, size, rows), example)

  def examples(self):
    return self.data.examples()

  def eval_examples(self):
    return self.data.eval_examples()

  def eval_batch(self, example, size, rows=None):
    return self.data.eval_batch(example, size, rows)
