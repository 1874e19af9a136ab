"""A run of a second whose data, parameters or devices go wrong where they are told to."""

import dataclasses
import json
import threading
from typing import Literal

import jax
import numpy as np
from flax import nnx

from bigtrain import Checkpoints, Evaluation, Experiment, Logging, taps
from bigtrain.config import config
from bigtrain.experiment import Data, DataConfig, ModelConfig
from bigtrain.faults import Faults
from bigtrain.models.initial import FanIn, Initializer
from bigtrain.models.mlp import MLPConfig
from bigtrain.objectives.classification import Classification
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.parts import Part
from bigtrain.precision import project
from bigtrain.train import train
from tests import runs

BATCH = 8


@config
class Points(DataConfig):
  """Points around three centres; some of the examples are not what they should be."""

  at: tuple[int, ...] = ()  # Examples that are wrong.
  to: float = float(np.float32(1e30))  # What their first number is, or by what they are multiplied.
  how: Literal["set", "scale", "nan", "label", "once"] = "nan"

  def make(self, seed):
    return PointsData(self, seed)

  def n_classes(self):
    return 3

  def input_shape(self):
    return (4,)


class PointsData(Data):
  def __init__(self, c: Points, seed: int):
    self.c, self.seed, self.given, self.lock = c, seed, set(), threading.Lock()

  def spec(self, size):
    kinds = {"inputs": (np.float32, 4), "labels": (np.int32,), "weights": (np.float32,)}
    return {k: jax.ShapeDtypeStruct((size, *shape), d) for k, (d, *shape) in kinds.items()}

  def batch(self, example, size, rows=None):
    wanted = (example + np.arange(size))[rows or slice(None)]
    found = [self._point(int(i)) for i in wanted]
    return {
      "inputs": np.stack([x for x, _ in found]).astype(np.float32),
      "labels": np.array([label for _, label in found], np.int32),
      "weights": np.ones(len(found), np.float32),
    }

  def _point(self, i: int):
    random = np.random.default_rng([self.seed, i])
    label = int(random.integers(3))
    x = np.eye(4)[label] + 0.3 * random.normal(size=4)
    if i in self.c.at:
      match self.c.how:
        case "nan":
          x[1] = np.nan
        case "set":
          x[1] = self.c.to
        case "scale":
          x = x * self.c.to
        case "label":
          label = 7
        case "once":  # As where a chip or a memory fails: not when it is done again.
          with self.lock:
            x[1] = x[1] if i in self.given else np.nan
            self.given.add(i)
    return x, label

  def eval_examples(self):
    return 0

  def eval_batch(self, example, size, rows=None):
    raise NotImplementedError


@config
class Powers(ModelConfig):
  """Takes the fourth power of its hidden units, which is soon too large for float16."""

  dtype: Literal["float32", "float16"] = "float16"

  def make(self, key):
    return PowersModel(self, key)

  def n_classes(self):
    return 3


class PowersModel(nnx.Module):
  def __init__(self, c: Powers, key):
    self.c = c
    keys, init = jax.random.split(key), Initializer(FanIn(), layers=1)
    sizes = {"I": 4, "F": 8, "C": 3}
    self.up_IF = init.weight(keys[0], "IF", sizes, fan_in="I")
    self.down_FC = init.weight(keys[1], "FC", sizes, fan_in="F")

  def logits(self, inputs, key):
    x_BI = inputs.astype(self.c.dtype)
    with taps.named("up_IF"):
      h_BF = project("BI,IF->BF", x_BI, self.up_IF) ** 4
      taps.tap("output", taps.rms, h_BF)
    return project("BF,FC->BC", h_BF, self.down_FC).astype("float32")


def base() -> Experiment:
  """Without an examination, which takes longer than the run."""
  return Experiment(
    model=MLPConfig(inputs=4, hidden=(8, 8), classes=3, dtype="float32"),
    data=Points(),
    objective=Classification(),
    optimizer=SGD(lr=0.1, schedule=Constant(warmup=0), momentum=0.0),
    steps=16,
    batch=BATCH,
    evaluation=Evaluation(every=0),
    checkpoints=Checkpoints(every=4),
    faults=Faults(examine=0),
    logging=Logging(every=1, layers_every=0, tensorboard=False),
  )


def nan_in_step_11() -> Experiment:
  e = base()
  e.data.at, e.faults.examine = (10 * BATCH + 3,), 1
  return e


def rolled_back() -> Experiment:
  e = nan_in_step_11()
  e.faults.policy = "roll_back"
  return e


class Plant(Part):
  """Calls a function of the run before the step that follows so many."""

  def __init__(self, before: int, plant):
    self.before, self.plant = before, plant

  def before_step(self, step):
    if step == self.before:
      self.before = -1  # Once, also if the run goes back.
      self.plant(self.run)


def losses(run_dir) -> list[float]:
  return [row["loss"] for row in runs.read(run_dir, "metrics.jsonl")]


def kept(run_dir, name="00000011"):
  folder = run_dir / "incidents" / name
  return json.loads((folder / "incident.json").read_text()), folder


def trained(e, path, **options):
  run = train(e, path, quiet=True, **options)
  return run.directory.path


def plant_nan(run):
  state = run.state
  spoil = lambda w: w.at[(0,) * w.ndim].set(np.nan)
  leaves, structure = jax.tree.flatten(state.model)
  leaves[-1] = jax.jit(spoil)(leaves[-1])
  run.state = dataclasses.replace(state, model=jax.tree.unflatten(structure, leaves))
