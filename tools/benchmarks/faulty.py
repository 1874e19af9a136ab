"""An experiment with a fault that one device does not show: `bigtrain parity` finds it.

    bigtrain parity tools/benchmarks/faulty.py --mesh.data 2 --mesh.fsdp 2

Hidden units are standardised over the batch, in a shard_map that forgets to average over devices:
each takes the mean and the variance of its own rows. `sound` averages. docs/parity.md shows both.

Dims: B batch, C the plane, F hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import Experiment, sharding
from bigtrain.config import config
from bigtrain.data.datasets import Digits
from bigtrain.data.features import FeatureData
from bigtrain.experiment import ModelConfig
from bigtrain.models.initial import FanIn, Initializer
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adamw import AdamW
from bigtrain.precision import project

INPUTS, CLASSES = 64, 10  # Of scikit-learn's digits.


@config
class StandardizedConfig(ModelConfig):
  hidden: int = 64  # Units of each of the two layers.
  averages: bool = False  # Over the devices.

  def make(self, key):
    return Standardized(self, key)

  def dims(self):
    return {"hidden": ("F", self.hidden)}

  def n_classes(self):
    return CLASSES


class Standardized(nnx.Module):
  def __init__(self, c: StandardizedConfig, key):
    self.c = c
    init, sizes = Initializer(FanIn(), layers=2), {"I": INPUTS, "F": c.hidden, "C": CLASSES}
    ku, kd = jax.random.split(key)
    self.up_IF = init.weight(ku, "IF", sizes, fan_in="I")
    self.up_scale_F = init.constant("F", sizes, 1.0)
    self.down_FC = init.weight(kd, "FC", sizes, fan_in="F")

  def logits(self, inputs_BI, key):
    h_BF = project("BI,IF->BF", inputs_BI, self.up_IF)
    h_BF = jnp.tanh(self.standardized(h_BF) * self.up_scale_F[...])
    return project("BF,FC->BC", h_BF, self.down_FC)

  def standardized(self, x_BF):
    mesh = jax.sharding.get_abstract_mesh()
    rows = () if mesh.empty else tuple(a for a in sharding.axes("B") if mesh.shape[a] > 1)

    def local(x_BF):
      mean = lambda x: jax.lax.pmean(x.mean(0), rows if self.c.averages else ())
      x_BF -= mean(x_BF)
      return x_BF * jax.lax.rsqrt(mean(x_BF**2) + 1e-5)

    spec = jax.typeof(x_BF).sharding.spec
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x_BF) if rows else local(x_BF)


def base() -> Experiment:
  """The fault."""
  return Experiment(
    model=StandardizedConfig(),
    data=FeatureData(source=Digits()),
    optimizer=AdamW(lr=1e-3),
    objective=Classification(),
    steps=1000,
    batch=64,
  )


def sound() -> Experiment:
  """The same without it."""
  e = base()
  e.model.averages = True
  return e
