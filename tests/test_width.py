"""muP: a wide model moves and computes as its base does.

Dims: B batch, T position, V vocabulary.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigtrain import taps
from bigtrain.models import activation
from bigtrain.models.encoder import EncoderConfig, MaskedLMConfig, TextClassifierConfig
from bigtrain.models.initial import Mup
from bigtrain.models.position import Learned
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.muon import Muon
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from bigtrain.validate import validate
from tests import packed
from tests.models.build import filled
from tests.widths import (
  AT_BASE,
  T,
  V,
  blocks,
  decoder,
  dense,
  inputs,
  mup,
  untied,
  vit,
)

# The coordinate check (appendix D.1 of the paper).


def movements(c, optimizer, monkeypatch, steps=4):
  """How far these updates move each layer's output, and the logits, on average over elements."""
  monkeypatch.setattr(taps, "rms", lambda x: x)  # Taps of the blocks and of the activations
  monkeypatch.setattr(activation, "dead", lambda x: x)  # have the outputs themselves.
  c.check()
  tx, x = optimizer.make(steps, c.width()), inputs(c)

  def loss(model):
    logits, found = taps.collect(model)(x)
    kept = {k: v for k, v in found.items() if k.startswith(("output", "dead"))}
    labels = np.random.default_rng(1).integers(0, V, logits.shape[:-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return nll.mean(), kept | {"logits": logits}

  @jax.jit
  def step(model, state):
    gradient, outputs = jax.grad(loss, has_aux=True)(model)
    updates, state = tx.update(gradient, state, model)
    return optax.apply_updates(model, updates), state, outputs

  model = jax.jit(c.make)(jax.random.key(0))
  state = jax.jit(tx.init)(model)
  seen = []
  for _ in range(steps + 1):
    model, state, outputs = step(model, state)
    seen.append(outputs)
  return {k: float(jnp.abs(x - seen[0][k]).mean()) for k, x in seen[-1].items()}


def slopes(make, init, optimizer, monkeypatch, widths):
  """Of the logarithm of each movement against that of the width."""
  found = [movements(make(width, init), optimizer, monkeypatch) for width in widths]
  of = lambda name: np.polyfit(np.log(widths), np.log([f[name] for f in found]), 1)[0]
  return {name: float(of(name)) for name in found[0]}


FIELDS = {"schedule": Constant(), "weight_decay": 0.01}
ADAM = AdamW(lr=2e-3, **FIELDS)
CASES = {
  "decoder": (decoder, ADAM, (64, 128, 256, 512)),
  "muon": (untied, Muon(lr=0.02, adam_lr=2e-3, **FIELDS), (64, 256)),
  "dense": (dense, SGD(lr=0.1, **FIELDS), (64, 128, 256, 512)),
}
BAND = 0.25  # Of slopes that count as flat; those of the standard parametrisation are above 0.4.


@pytest.mark.parametrize("name", CASES)
def test_updates_move_every_layer_equally_at_every_width(name, monkeypatch):
  make, optimizer, widths = CASES[name]
  found = slopes(make, mup(), optimizer, monkeypatch, widths)
  assert "logits" in found and len(found) >= 3
  assert {k: s for k, s in found.items() if abs(s) > BAND} == {}


def test_in_the_standard_parametrisation_they_move_with_the_width(monkeypatch):
  found = slopes(decoder, AT_BASE, ADAM, monkeypatch, (128, 512))
  outputs = {k: s for k, s in found.items() if not k.startswith("dead")}
  assert len(outputs) == 2 and min(outputs.values()) > 0.4, found


# The base.


def test_at_the_base_everything_is_the_standard_parametrisation_bit_by_bit():
  standard = packed.experiment(model={"layers": 1, "remat": "none"})
  base = copy.deepcopy(standard)
  base.model.init = Mup(base=packed.D, head_dim=packed.H, at_base=standard.model.init)
  validate(base, devices=8)
  runs = []
  for e in (standard, base):
    program, batch = Program(e, None), e.data.make(0).batch(0, 8)
    state = program.compile_init()(jax.random.key(0))
    step = jax.jit(program.step)
    state, first = step(state, batch)
    state, second = step(state, batch)
    runs.append(jax.device_get([jax.tree.leaves(state.model), first, second]))
  jax.tree.map(np.testing.assert_array_equal, *runs)


# Forward.


def masked(dim, init):
  return MaskedLMConfig(encoder=encoder(dim, init), next_sentence=True)


def encoder(dim, init):
  return EncoderConfig(vocab=V, position=Learned(length=T), init=init, **blocks(dim, causal=False))


def classifier(dim, init):
  return TextClassifierConfig(encoder=encoder(dim, init), classes=3)


def scores(c, model):
  """All logits that a model has."""
  tokens = np.random.default_rng(0).integers(0, V, (4, T))
  if isinstance(c, MaskedLMConfig):
    return model(tokens), model.next_sentence(model.encoder(tokens))
  return model(tokens if isinstance(c, TextClassifierConfig) else inputs(c))


@pytest.mark.parametrize("make", [decoder, untied, vit, dense, masked, classifier])
def test_logits_fall_with_the_width_and_scores_with_that_of_the_heads(make):
  """Those of the same weights in the standard parametrisation, with smaller queries, over 2."""
  standard, scaled = make(128, AT_BASE), make(128, mup())
  scaled.check()
  output_bias = lambda name: "bias_C" in name or "bias_V" in name or "layers[2].bias" in name
  clear = lambda path, w: w * (not output_bias(jax.tree_util.keystr(path)))
  weights = jax.tree_util.tree_map_with_path(clear, filled(standard.make))
  structure = jax.tree.structure(jax.eval_shape(scaled.make, jax.random.key(0)))
  model = jax.tree.unflatten(structure, jax.tree.leaves(weights))
  heads = scaled.width().head
  assert heads == (1.0 if make in (untied, dense) else 2.0)
  smaller = lambda path, w: w * (heads**-0.5 if ".q_DKGH" in jax.tree_util.keystr(path) else 1)
  weights = jax.tree_util.tree_map_with_path(smaller, weights)
  run = lambda c, m: jax.jit(lambda m: scores(c, m))(m)
  wanted = jax.tree.map(lambda x: x / 2, run(standard, weights))
  close = lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, run(scaled, model), wanted)
