"""The run of tests/runs.py with wrong numbers in it, for the command line.

$WRONG says which, as in "nan-data 80": in the batch that has example 80, weights that are NaN
("nan-data") or huge ("huge-data"), or a gradient that is ("nan-gradient", "huge-gradient"), with a
loss that is as it was; or "device 20": from the first save behind step 20 on, one bit of what the
last device holds of a parameter is another one, as where it has computed wrong.
"""

import contextlib
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import Experiment
from bigtrain.config import config
from bigtrain.data.text import TextData
from bigtrain.faults import Faults
from bigtrain.leaves import flatten, unflatten
from bigtrain.objectives import CausalLM
from bigtrain.run import Run
from tests import runs

MARK = 1e-3  # A weight that tells the objective to spoil its gradient.


def wanted() -> tuple[str, int]:
  kind, example = os.environ.get("WRONG", "none 0").split()
  return kind, int(example)


@config
class WrongData(TextData):
  def make(self, seed):
    data = TextData.make(self, seed)
    batch, (kind, at) = data.batch, wanted()

    def spoiled(example, size, rows=None):
      found = batch(example, size, rows)
      if example <= at < example + size and kind not in ("none", "device"):
        value = {"nan-data": np.nan, "huge-data": 3e38}.get(kind, MARK)
        found["weights"] = np.where(np.arange(found["weights"].shape[1]) < 3, value, 1)
        found["weights"] = found["weights"].astype(np.float32) * np.ones((size, 1), np.float32)
      return found

    data.batch = spoiled
    return data


@jax.custom_vjp
def spoil(x, how):
  return x


spoil.defvjp(
  lambda x, how: (x, how), lambda how, g: (jnp.where(how != 0, g * how, g), jnp.zeros_like(how))
)


@config
class WrongGradient(CausalLM):
  def __call__(self, model, batch, key):
    kind, _ = wanted()
    factor = {"nan-gradient": jnp.nan, "huge-gradient": 3e38}.get(kind, 0.0)
    marked = (batch["weights"] == jnp.float32(MARK)).any()
    how = jnp.where(marked, jnp.float32(factor), 0.0)
    output = CausalLM.__call__(self, model, batch, key)
    return dataclasses.replace(output, loss_sum=spoil(output.loss_sum, how))


@contextlib.contextmanager
def spoiling(self, phase, *, away=Run.away, **fields):
  kind, step = wanted()
  if kind == "device" and phase == "save" and fields.get("step", 0) > step:
    os.environ["WRONG"] = "none 0"
    state = self.state
    model = flatten(state.model)
    name, value = next((n, x) for n, x in model.items() if x.is_fully_replicated)
    shards = [shard.data for shard in value.addressable_shards]
    bits = np.array(shards[-1]).view(np.uint32)
    bits.flat[0] ^= 1 << 12
    shards[-1] = jax.device_put(bits.view(np.float32), value.addressable_shards[-1].device)
    model[name] = jax.make_array_from_single_device_arrays(value.shape, value.sharding, shards)
    self.state = dataclasses.replace(state, model=unflatten(model, state.model))
  with away(self, phase, **fields):
    yield


Run.away = spoiling


def base() -> Experiment:
  e = runs.base()
  fields = {name: getattr(e.data, name) for name in TextData.__dataclass_fields__}
  e.data = WrongData(**fields)
  e.objective = WrongGradient(loss_chunk=None)
  e.faults = Faults(spike=20.0, window=8)
  return e
