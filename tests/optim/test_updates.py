"""Every optimizer equals its paper, on stacked parameters and on a mesh, in float64.

Dims: L layers, D model, K kv heads, G queries per kv head, H head, F hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bigtrain import sharding
from bigtrain.mesh import Mesh
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adam import Adam, AdEMAMix, NAdam
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.average import averaged
from bigtrain.optim.lamb import LAMB
from bigtrain.optim.lion import Lion
from bigtrain.optim.muon import Muon
from bigtrain.optim.rms import Adagrad, RMSProp
from bigtrain.optim.schedule import Constant
from bigtrain.optim.schedule_free import ScheduleFreeAdamW
from bigtrain.optim.sgd import SGD
from bigtrain.optim.soap import SOAP
from tests.optim import references

# Rates are exact in float32, in which schedules are.
STEPS, LR, DECAY = 5, 0.125, 0.3
SIZES = {"L": 2, "D": 8, "K": 2, "G": 2, "H": 2, "F": 16, "V": 8}
# The shape that a layer of each parameter has for its reference.
SHAPES = {
  "q_DKGH": (8, 8),
  "o_KGHD": (8, 8),
  "up_DF": (8, 16),
  "down_FD": (16, 8),
  "bias_KGH": (8,),
  "scale_D": (8,),
  "embed_VD": (8, 8),
}
STACKED = ("q_DKGH", "o_KGHD", "up_DF", "down_FD", "bias_KGH", "scale_D")
MATRICES = ("q_DKGH", "o_KGHD", "up_DF", "down_FD")

FIELDS = {"lr": LR, "weight_decay": DECAY, "clip": None, "schedule": Constant(warmup=2)}

BETAS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}


def case(cls, reference, rest=None, **fields):
  """An optimizer with a reference for its matrices, and one for all else where that differs."""
  return cls(**FIELDS | fields), reference, rest or reference


CASES = {
  "gradient_descent": case(SGD, references.sgd(0), momentum=0.0),
  "momentum": case(SGD, references.sgd(0.8), momentum=0.8),
  "nesterov": case(SGD, references.sgd(0.8, True), momentum=0.8, nesterov=True),
  "adagrad": case(Adagrad, references.adagrad(0.1, 1e-3), start=0.1, eps=1e-3),
  "rmsprop": case(RMSProp, references.rmsprop(0.8, 1e-3, 0), decay=0.8, eps=1e-3),
  "rmsprop_momentum": case(
    RMSProp, references.rmsprop(0.8, 1e-3, 0.5), decay=0.8, eps=1e-3, momentum=0.5
  ),
  "adam": case(Adam, references.adam(**BETAS), **BETAS),
  "adamw": case(AdamW, references.adam(**BETAS), **BETAS),
  "nadam": case(NAdam, references.nadam(**BETAS), **BETAS),
  "ademamix": case(
    AdEMAMix,
    references.ademamix(**BETAS, b3=0.99, alpha=3.0, rise=4),
    **BETAS,
    b3=0.99,
    alpha=3.0,
    rise=4,
  ),
  "lion": case(Lion, references.lion(0.8, 0.9), b1=0.8, b2=0.9),
  "lamb": case(LAMB, references.lamb(**BETAS), references.adam(**BETAS), **BETAS),
  "adafactor": case(
    Adafactor,
    references.adafactor(0.7, 0.9, 1e-3, 0.5),
    decay=0.7,
    threshold=0.9,
    eps=1e-3,
    least=0.5,
  ),
  "adafactor_plain": case(Adafactor, references.adafactor(0.8, 1.0, 1e-30, None), least=None),
  "muon": case(
    Muon,
    references.muon(0.8, 4, "spectral"),
    references.adam(**BETAS),
    momentum=0.8,
    iterations=4,
    adam_lr=LR / 4,
    **BETAS,
  ),
  "muon_rms": case(
    Muon,
    references.muon(0.95, 5, "rms"),
    references.adam(**BETAS),
    scale="rms",
    adam_lr=LR / 4,
    **BETAS,
  ),
  # A gradient of fewer rows than columns has no unique eigenvectors on the longer side.
  "soap": case(
    SOAP,
    references.soap(**BETAS, every=2, largest=8),
    references.adam(**BETAS),
    every=2,
    largest=8,
    **BETAS,
  ),
  "schedule_free": case(ScheduleFreeAdamW, references.schedule_free(**BETAS), **BETAS),
}


class Layers(nnx.Module):
  def __init__(self, r):
    for name in SHAPES:
      dims = name.rpartition("_")[2]
      letters = "L" + dims if name in STACKED else dims
      table = sharding.act if name in ("bias_KGH", "scale_D") else sharding.weight
      values, place = r.normal(size=[SIZES[d] for d in letters]), table(letters)
      setattr(self, name, nnx.Param(values if place is None else jax.device_put(values, place)))


def run(optimizer, gradients):
  """The weights before and after the updates, and the state of the optimizer."""
  r = np.random.default_rng(0)
  model = before = jax.tree.map(jnp.asarray, Layers(r))
  tx = optimizer.make(STEPS)
  state = jax.jit(tx.init)(model)
  place = lambda g, w: jax.device_put(g, w.sharding)

  @jax.jit
  def step(model, state, g):
    updates, state = tx.update(g, state, model)
    return optax.apply_updates(model, updates), state

  for g in gradients:
    model, state = step(model, state, jax.tree.map(place, g, model))
  return before, model, state


def layers(tree, name) -> list[np.ndarray]:
  """The layers of a parameter, in the shape of its reference."""
  value = np.asarray(getattr(tree, name)[...])
  return [x.reshape(SHAPES[name]) for x in (value if name in STACKED else value[None])]


@pytest.mark.parametrize("name", CASES)
def test_five_updates_on_a_mesh_are_the_formula_of_the_paper(name):
  optimizer, of_matrices, of_rest = CASES[name]
  optimizer.check()
  r = np.random.default_rng(1)
  with jax.enable_x64(True), jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()):
    gradients = [jax.tree.map(np.asarray, Layers(r)) for _ in range(STEPS)]
    before, after, state = run(optimizer, gradients)
    rates = [float(optimizer.learning_rate(STEPS)(s)) for s in range(STEPS)]
    evaluated = averaged(state, after)
    check_shardings(after, before)
    for leaf in jax.tree.leaves(state):
      check_leaf(leaf)
  for path in SHAPES:
    matrix = path in MATRICES or (path == "embed_VD" and not hasattr(optimizer, "spared"))
    reference = of_matrices if matrix else of_rest
    factor = optimizer.adam_lr / LR if isinstance(optimizer, Muon) and not matrix else 1
    decay = DECAY if path in (*MATRICES, "embed_VD") else 0.0
    for i, w in enumerate(layers(before, path)):
      g = [layers(g, path)[i] for g in gradients]
      wanted = reference(w, g, [factor * rate for rate in rates], decay)
      assert np.abs(wanted - w).max() > 1e-3
      np.testing.assert_allclose(layers(after, path)[i], wanted, rtol=1e-9, atol=1e-10)
      if isinstance(optimizer, ScheduleFreeAdamW):
        x = references.schedule_free(**BETAS, evaluated=True)(w, g, rates, decay)
        np.testing.assert_allclose(layers(evaluated, path)[i], x, rtol=1e-9, atol=1e-10)


def check_shardings(after, before):
  for w, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    assert jax.typeof(w) == jax.typeof(old)


def check_leaf(leaf):
  """A leaf of the state as large as a matrix is spread over the mesh."""
  assert leaf.dtype in (jnp.int32, jnp.float64)
  if leaf.size >= 64 * 2:
    assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape
