import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.mesh import Mesh
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adam import AdEMAMix
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.average import averaged
from bigtrain.optim.clip import by_global_norm, by_unit
from bigtrain.optim.lamb import LAMB
from bigtrain.optim.lion import Lion
from bigtrain.optim.muon import Muon
from bigtrain.optim.optimizer import Optimizer
from bigtrain.optim.rms import Adagrad, RMSProp
from bigtrain.optim.schedule import Constant, Linear
from bigtrain.optim.schedule_free import ScheduleFreeAdamW
from bigtrain.optim.sgd import SGD
from bigtrain.optim.soap import SOAP
from tests.optim.test_updates import CASES

pytestmark = pytest.mark.smoke

STEPS = 5


class Layer(nnx.Module):
  def __init__(self, key):
    draw = lambda dims, shape: nnx.Param(
      jax.random.normal(key, shape, out_sharding=sharding.weight(dims))
    )
    self.up_DF = draw("DF", (4, 8))
    self.norm = nnx.Dict(scale_D=nnx.Param(jnp.ones(4)))
    self.bias_F = nnx.Param(jnp.full(8, 0.5, jnp.float32))


def run(optimizer, seed=0):
  """The weights after STEPS updates, the gradients they got, and the optimizer's state."""
  model = jax.jit(Layer)(jax.random.key(seed))
  tx = optimizer.make(STEPS)
  state = jax.jit(tx.init)(model)
  r = np.random.default_rng(seed)
  gradients = []

  @jax.jit
  def step(model, state, g):
    updates, state = tx.update(g, state, model)
    return optax.apply_updates(model, updates), state

  for _ in range(STEPS):
    draw = lambda w: jax.device_put(r.normal(size=w.shape).astype(np.float32), w.sharding)
    gradients.append(jax.tree.map(draw, model))
    model, state = step(model, state, gradients[-1])
  return model, gradients, state


def by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(a, np.float64) for p, a in leaves}


def start():
  return by_path(Layer(jax.random.key(0)))


def test_adamw_is_its_closed_form_with_decoupled_decay_of_matrices_only():
  optimizer = AdamW(lr=0.1, b2=0.9, eps=1e-3, schedule=Linear(warmup=2), clip=None)
  model, gradients, _ = run(optimizer)
  for path, w in start().items():
    m = v = 0.0
    for s, g in enumerate(by_path(g)[path] for g in gradients):
      rate = 0.1 * [1 / 2, 1, 1, 2 / 3, 1 / 3][s]
      m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g**2
      adam = m / (1 - 0.9 ** (s + 1)) / (np.sqrt(v / (1 - 0.9 ** (s + 1))) + 1e-3)
      w = w - rate * (adam + (0.1 * w if path == ".up_DF.value" else 0))
    np.testing.assert_allclose(by_path(model)[path], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_sgd_is_its_closed_form(momentum, nesterov):
  optimizer = SGD(lr=0.1, momentum=momentum, nesterov=nesterov, schedule=Constant(), clip=None)
  model, gradients, _ = run(optimizer)
  for path, w in start().items():
    velocity = 0.0
    for g in (by_path(g)[path] for g in gradients):
      velocity = momentum * velocity + g
      w = w - 0.1 * (momentum * velocity + g if nesterov else velocity)
    np.testing.assert_allclose(by_path(model)[path], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("no_decay", "spared"),
  [
    ("scale|bias", {".norm.scale_D.value", ".bias_F.value"}),
    ("^.up", {".up_DF.value"}),
    (None, set()),
  ],
)
def test_decay_spares_the_paths_in_which_the_pattern_is_found(no_decay, spared):
  fields = {"lr": 0.1, "schedule": Constant(), "clip": None, "momentum": 0.0}
  with_decay = run(SGD(weight_decay=0.5, no_decay=no_decay, **fields))[0]
  without = run(SGD(**fields))[0]
  a, b = by_path(with_decay), by_path(without)
  assert {path for path in a if (a[path] == b[path]).all()} == spared


def test_clipping_scales_all_gradients_to_the_limit_together():
  gradients = {"a": jnp.float32([3, 0]), "b": jnp.float32([[0], [4]])}
  clip = lambda limit: by_global_norm(limit).update(gradients, optax.EmptyState())[0]
  np.testing.assert_allclose(clip(1.0)["a"], [0.6, 0], rtol=1e-6)
  np.testing.assert_allclose(clip(1.0)["b"], [[0], [0.8]], rtol=1e-6)
  assert all((x == y).all() for x, y in zip(clip(5.0).values(), gradients.values(), strict=True))
  zeros = {"a": jnp.zeros(2)}
  assert not by_global_norm(1.0).update(zeros, optax.EmptyState())[0]["a"].any()


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
  ones = jnp.ones(2**16, jnp.bfloat16)  # A bfloat16 sum of ones stops at 256.
  clipped = by_global_norm(64.0).update(ones, optax.EmptyState())[0]
  assert clipped.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(clipped), 0.25)


def test_the_optimizer_clips_before_its_moments():
  fields = {"lr": 0.1, "schedule": Constant(), "momentum": 0.0}
  model, gradients, _ = run(SGD(clip=0.5, **fields))
  norms = [np.sqrt(sum((a**2).sum() for a in by_path(g).values())) for g in gradients]
  for path, w in start().items():
    moved = sum(by_path(g)[path] * 0.5 / n for g, n in zip(gradients, norms, strict=True))
    np.testing.assert_allclose(by_path(model)[path], w - 0.1 * moved, rtol=1e-5, atol=1e-6)


def test_clipping_by_value_limits_each_element_and_keeps_its_sign():
  fields = {"lr": 1.0, "schedule": Constant(), "momentum": 0.0, "clip": None, "average": None}
  model, gradients, _ = run(SGD(clip_value=0.5, **fields))
  for path, w in start().items():
    moved = sum(np.clip(by_path(g)[path], -0.5, 0.5) for g in gradients)
    np.testing.assert_allclose(by_path(model)[path], w - moved, rtol=1e-5, atol=1e-6)


def test_adaptive_clipping_limits_each_unit_of_each_layer_to_a_share_of_its_weights():
  r = np.random.default_rng(0)
  draw = lambda *shape: r.normal(size=shape).astype(np.float32)
  weights = {
    "q_DKH": draw(3, 4, 2, 5),
    "down_FD": draw(8, 4),
    "bias_F": np.zeros((3, 8), np.float32),
  }
  gradients = {name: 0.3 * draw(*w.shape) for name, w in weights.items()}
  gradients["down_FD"][:, 1] *= 1e-3
  got = by_unit(0.25).update(gradients, optax.EmptyState(), weights)[0]
  # The columns of each layer, as plain matrices of (inputs, outputs): a bias is one vector.
  plain = {"q_DKH": (3, 4, 10), "down_FD": (1, 8, 4), "bias_F": (3, 8, 1)}
  for name, shape in plain.items():
    w, g, clipped = (np.reshape(x[name], shape) for x in (weights, gradients, got))
    largest = 0.25 * np.maximum(np.linalg.norm(w, axis=1), 1e-3)
    norm = np.linalg.norm(g, axis=1)
    wanted = np.where(norm > largest, largest / norm, 1)[:, None] * g
    np.testing.assert_allclose(clipped, wanted, rtol=1e-5, atol=1e-7)
  assert (got["down_FD"][:, 1] == gradients["down_FD"][:, 1]).all()
  assert not (got["down_FD"] == gradients["down_FD"]).all()


def test_rates_of_groups_multiply_the_learning_rate_and_the_decay_with_it():
  fields = {"lr": 0.1, "schedule": Linear(warmup=0), "clip": None, "weight_decay": 0.5}
  rates = (("up|norm", 0.5), ("norm", 0.25), ("bias", 0.0))
  model, gradients, _ = run(SGD(momentum=0.0, rates=rates, **fields))
  factors = {".up_DF.value": 0.5, ".norm.scale_D.value": 0.125, ".bias_F.value": 0.0}
  for path, w in start().items():
    for s, g in enumerate(by_path(g)[path] for g in gradients):
      rate = 0.1 * (STEPS - s) / STEPS * factors[path]
      w = w - rate * (g + (0.5 * w if path == ".up_DF.value" else 0))
    np.testing.assert_allclose(by_path(model)[path], w, rtol=1e-5, atol=1e-6)


def test_a_rate_for_a_group_that_no_parameter_is_in_is_refused():
  tx = SGD(lr=0.1, rates=(("up", 1.0), ("nrm", 0.5))).make(1)
  message = r"rates: 'nrm' is found in no parameter's path; did you mean|there is .*scale_D"
  with pytest.raises(Refused, match=message):
    jax.eval_shape(lambda: tx.init(Layer(jax.random.key(0))))


def test_on_a_mesh_the_state_is_sharded_as_the_weights_and_the_weights_are_the_same():
  optimizer = AdamW(lr=0.1, clip=0.5, average=0.9)
  wanted, _, wanted_state = run(optimizer)
  with jax.set_mesh(Mesh(fsdp=4, tensor=2).make()):
    model, _, state = run(optimizer)
    specs = [jax.typeof(w) for w in jax.tree.leaves(model)]
    assert sharding.P("fsdp", "tensor") in [t.sharding.spec for t in specs]
    moments = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    for tree in (moments.mu, moments.nu, averaged(state, model)):
      assert [jax.typeof(a) for a in jax.tree.leaves(tree)] == specs
  for a, b in ((wanted, model), (averaged(wanted_state, wanted), averaged(state, model))):
    chex.assert_trees_all_close(a, jax.device_get(b), rtol=1e-5, atol=1e-6)


def test_the_recorded_rate_is_the_one_that_is_used():
  optimizer = SGD(lr=0.3, schedule=Linear(warmup=0), momentum=0.0, clip=None)
  tx, w = optimizer.make(3), jnp.ones(1)
  state = tx.init(w)
  for s in range(3):
    updates, state = tx.update(jnp.ones(1), state, w)
    assert float(-updates[0]) == float(optimizer.learning_rate(3)(s))


def test_a_new_optimizer_is_one_class_with_a_direction():
  @config
  class Sign(Optimizer):
    def direction(self):
      return optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))

  tx, w = Sign(lr=0.5, schedule=Constant()).make(1), jnp.ones(2)
  updates, _ = tx.update(jnp.float32([3, -4]), tx.init(w), w)
  np.testing.assert_array_equal(updates, [-0.5, 0.5])


@pytest.mark.parametrize(
  ("optimizer", "field"),
  [
    (AdamW(lr=0.0), "lr"),
    (AdamW(lr=0.1, b1=1.0), "b1"),
    (AdamW(lr=0.1, b2=-0.1), "b2"),
    (AdamW(lr=0.1, eps=0.0), "eps"),
    (AdamW(lr=0.1, weight_decay=-0.1), "weight_decay"),
    (AdamW(lr=0.1, clip=0.0), "clip"),
    (AdamW(lr=0.1, average=1.0), "average"),
    (AdamW(lr=0.1, no_decay=""), "no_decay"),
    (AdamW(lr=0.1, no_decay="scale|(bias"), "no_decay"),
    (AdamW(lr=0.1, clip_value=0.0), "clip_value"),
    (AdamW(lr=0.1, clip_unit=-1.0), "clip_unit"),
    (AdamW(lr=0.1, rates=(("(bias", 1.0),)), "rates"),
    (AdamW(lr=0.1, rates=(("bias", -1.0),)), "rates:"),
    (AdEMAMix(lr=0.1, b1=0.0), "b1"),
    (AdEMAMix(lr=0.1, b1=0.99, b3=0.9), "b1"),
    (AdEMAMix(lr=0.1, alpha=-1.0), "alpha"),
    (AdEMAMix(lr=0.1, rise=0), "rise"),
    (Adagrad(lr=0.1, start=-1.0), "start"),
    (Adagrad(lr=0.1, eps=0.0), "eps"),
    (RMSProp(lr=0.1, decay=1.0), "decay"),
    (Adafactor(lr=0.1, threshold=0.0), "threshold"),
    (Lion(lr=0.1, b2=1.5), "b2"),
    (Muon(lr=0.1, iterations=0), "iterations"),
    (Muon(lr=0.1, adam_lr=0.0), "adam_lr"),
    (Muon(lr=0.1, spared="("), "spared"),
    (SOAP(lr=0.1, every=0), "every"),
    (SOAP(lr=0.1, spared=""), "spared"),
    (ScheduleFreeAdamW(lr=0.1, b1=0.0), "b1"),
    (ScheduleFreeAdamW(lr=0.1, average=0.9), "average"),
    (SGD(lr=-1.0), "lr"),
    (SGD(lr=0.1, momentum=1.0), "momentum"),
    (SGD(lr=0.1, momentum=0.0, nesterov=True), "nesterov"),
  ],
)
def test_impossible_values_are_refused_by_name(optimizer, field):
  with pytest.raises(Refused, match=f"^{field} "):
    optimizer.check()


def test_defaults_are_possible():
  kinds = {type(optimizer) for optimizer, *_ in CASES.values()}
  assert len(kinds) == 13
  for optimizer in (kind(lr=0.1) for kind in kinds):
    optimizer.check()
    optimizer.schedule.check()


def test_an_optimizer_that_returns_no_direction_is_refused():
  @config
  class Forgetful(Optimizer):
    def direction(self):
      optax.scale_by_sign()

  with pytest.raises(Refused, match=r"Forgetful.direction\(\) returned None"):
    Forgetful(lr=0.1).make(10)


@pytest.mark.parametrize(
  "optimizer",
  [
    SGD(lr=0.1, average=0.9, weight_decay=0.1, rates=(("w", 0.5),)),
    AdamW(lr=0.01, average=0.99),
    LAMB(lr=0.01),
    ScheduleFreeAdamW(lr=0.01, schedule=Constant(warmup=2)),
  ],
  ids=lambda optimizer: type(optimizer).__name__,
)
def test_a_lowered_rate_is_a_lower_learning_rate(optimizer):
  tx, low = (o.make(10) for o in (optimizer, dataclasses.replace(optimizer, lr=optimizer.lr / 4)))
  r = np.random.default_rng(0)
  normal = lambda: {"w": jnp.asarray(r.normal(size=(3, 4)), jnp.float32)}
  w = normal()
  state = tx.init(w)
  for _ in range(4):
    updates, state = jax.jit(tx.update)(normal(), state, w)
    w = optax.apply_updates(w, updates)
  gradient = normal()
  lowered = lambda *a: tx.update(*a, lowered=jnp.float32(0.25))
  got, wanted = (jax.jit(f)(gradient, state, w) for f in (lowered, low.update))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, wanted)
  assert not np.allclose(got[0]["w"], jax.jit(tx.update)(gradient, state, w)[0]["w"], rtol=0.1)
