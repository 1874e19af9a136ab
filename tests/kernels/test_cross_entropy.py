"""Dims: B batch, T position, D model, V vocabulary."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from bigtrain import sharding
from bigtrain.kernels.cross_entropy import cross_entropy
from bigtrain.mesh import Mesh

pytestmark = pytest.mark.smoke

B, T, D, V = 8, 6, 16, 32
EXTRAS = {"z_loss": 1e-2, "label_smoothing": 0.1}
MESHES = [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8), (1, 2, 4), (4, 1, 2)]


def arguments(dtype=np.float32, scale=1.0):
  r = np.random.default_rng(0)
  weights_BT = r.uniform(0.1, 2, (B, T)) * (r.random((B, T)) < 0.8)
  return (
    (scale * r.normal(size=(B, T, D))).astype(dtype),
    r.normal(size=(V, D)).astype(dtype),
    r.integers(0, V, (B, T)).astype(np.int32),
    weights_BT.astype(np.float32),
  )


def plain(x_BTD, table_VD, targets_BT, weights_BT, z_loss=0.0, label_smoothing=0.0):
  """The formula, written down: the cross-entropy with smoothed targets, from all the logits."""
  logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, table_VD)
  log_p_BTV = jax.nn.log_softmax(logits_BTV)
  hot_BTV = jax.nn.one_hot(targets_BT, logits_BTV.shape[-1], dtype=logits_BTV.dtype)
  smooth_BTV = (1 - label_smoothing) * hot_BTV + label_smoothing / logits_BTV.shape[-1]
  z_BT = z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
  nll_BT = -(weights_BT[..., None] * hot_BTV * log_p_BTV).sum(-1)
  sums = {
    "nll_BT": nll_BT,
    "nll": nll_BT.sum(),
    "z_loss": (weights_BT * z_BT).sum(),
    "correct": (weights_BT * (logits_BTV.argmax(-1) == targets_BT)).sum(),
  }
  return -(weights_BT[..., None] * smooth_BTV * log_p_BTV).sum() + sums["z_loss"], sums


def gradients(f, args):
  return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*args)


@functools.cache
def exact(dtype=np.float32, scale=1.0, **extras):
  """The plain formula and its gradients on `arguments(dtype, scale)`, in float64."""
  with jax.enable_x64(True):
    args = arguments(dtype, scale)
    wide = [a if a.dtype == np.int32 else jnp.asarray(a, jnp.float64) for a in args]
    return jax.tree.map(np.asarray, gradients(functools.partial(plain, **extras), wide))


def assert_close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(np.asarray(a, np.float64) - b) <= rtol * np.linalg.norm(b)


def on_mesh(args):
  x, table, targets, weights = args
  specs = (sharding.act("BTD"), sharding.act("VD"), sharding.act("BT"), sharding.act("BT"))
  return [jax.device_put(a, s) for a, s in zip((x, table, targets, weights), specs, strict=True)]


def mesh_of(shape):
  data, fsdp, tensor = shape
  return jax.set_mesh(Mesh(data=data, fsdp=fsdp, tensor=tensor).make())


@pytest.mark.parametrize("chunk", [None, 1, 7, 16, 1000])  # Of 48 tokens.
@pytest.mark.parametrize("extras", [{}, EXTRAS])
def test_values_and_gradients_are_the_plain_formulas_in_float64(chunk, extras):
  args = arguments()
  got = gradients(functools.partial(cross_entropy, chunk=chunk, **extras), args)
  assert_close(got, exact(**extras), rtol=1e-6)


@pytest.mark.parametrize(("shape", "chunk"), [((2, 2, 2), None), *((shape, 5) for shape in MESHES)])
def test_every_mesh_gives_the_values_and_gradients_of_none(shape, chunk):
  args = arguments()
  f = functools.partial(cross_entropy, chunk=chunk, **EXTRAS)
  with mesh_of(shape):
    placed = on_mesh(args)
    got = gradients(f, placed)
    assert [jax.typeof(g) for g in got[1]] == [jax.typeof(a) for a in placed[:2]]
  assert_close(jax.device_get(got), exact(**EXTRAS), rtol=1e-6)


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 1, 8)])
def test_a_bias_of_the_vocabulary_is_one_more_column_of_the_table(shape):
  args = arguments()
  x, table, targets, weights = args
  bias = np.random.default_rng(1).normal(size=V).astype(np.float32)
  f = lambda x, table, bias, *rest: cross_entropy(x, table, *rest, chunk=5, bias_V=bias, **EXTRAS)
  wider = np.concatenate([x, np.ones((B, T, 1), np.float32)], axis=-1)
  column = np.concatenate([table, bias[:, None]], axis=-1)
  sums, (dx, dtable) = gradients(
    functools.partial(plain, **EXTRAS), (wider, column, targets, weights)
  )
  value = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
  if shape is None:
    got = value(x, table, bias, targets, weights)
  else:
    with mesh_of(shape):
      x, table, targets, weights = on_mesh(args)
      bias = jax.device_put(bias, sharding.act("V"))
      got = value(x, table, bias, targets, weights)
      assert jax.typeof(got[1][2]) == jax.typeof(bias)
  assert_close(jax.device_get(got), (sums, (dx[..., :-1], dtable[:, :-1], dtable[:, -1])), 1e-5)


def test_inside_an_island_it_gives_the_same():
  args = arguments()
  f = functools.partial(cross_entropy, chunk=5, **EXTRAS)
  with mesh_of((2, 2, 2)):
    placed = on_mesh(args)
    specs = tuple(jax.typeof(a).sharding.spec for a in placed)
    sums = dict.fromkeys(("nll", "z_loss", "correct"), P()) | {"nll_BT": specs[2]}
    got = gradients(jax.shard_map(f, in_specs=specs, out_specs=(P(), sums)), placed)
  assert_close(jax.device_get(got), exact(**EXTRAS), rtol=1e-6)


def test_a_scaled_loss_scales_its_gradients():
  args = arguments()
  mean = lambda *a: cross_entropy(*a, chunk=7)[0] / a[3].sum()
  wanted = exact()[1]
  assert_close(
    jax.grad(mean, argnums=(0, 1))(*args), [g / args[3].sum() for g in wanted], rtol=1e-6
  )


def test_bfloat16_operands_lose_no_more_than_their_own_rounding():
  args = arguments(jnp.bfloat16)
  wanted = exact(jnp.bfloat16)
  (loss, _), got = gradients(functools.partial(cross_entropy, chunk=7), args)
  assert loss.dtype == jnp.float32 and got[0].dtype == got[1].dtype == jnp.bfloat16
  np.testing.assert_allclose(loss, wanted[0][0], rtol=1e-5)
  assert_close(got, wanted[1], rtol=2**-8)  # A rounding of dlogits and one of the result.


def test_huge_logits_stay_finite():
  got = gradients(functools.partial(cross_entropy, chunk=7), arguments(scale=1e4))
  assert_close(got, exact(scale=1e4), rtol=1e-5)


def products(compiled):
  return len(re.findall(r"= \S+ dot\(", compiled))


def test_a_value_alone_costs_one_product_and_a_gradient_three():
  f = functools.partial(cross_entropy, chunk=16)
  value = jax.jit(f).lower(*arguments()).compile().as_text()
  gradient = jax.jit(jax.grad(lambda *a: f(*a)[0], argnums=(0, 1))).lower(*arguments())
  assert (products(value), products(gradient.compile().as_text())) == (1, 3)


def loops_and_rest(hlo):
  """The text of the computations that are (part of) a loop's body, and of all others."""
  computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", hlo, re.M | re.S))
  inside, queue = set(), re.findall(r"body=%?([\w.\-]+)", hlo)
  while queue:
    if (name := queue.pop()) not in inside:
      inside.add(name)
      queue += [n for n in computations if re.search(rf"%{re.escape(n)}\b", computations[name])]
  join = lambda names: "\n".join(computations[n] for n in names)
  return join(inside), join(computations.keys() - inside)


@pytest.mark.parametrize("chunk", [2, 4])
def test_a_gradient_is_summed_over_devices_once_and_not_in_every_chunk(chunk):
  f = lambda *a: cross_entropy(*a, chunk=chunk)[0]
  reduced = r"= ([^\n]*?) all-reduce(?:-start)?\("
  table = rf"f32\[{V // 2},{D}\]"
  with mesh_of((2, 2, 2)):
    lowered = jax.jit(jax.grad(f, argnums=(0, 1))).lower(*on_mesh(arguments()))
    loop, rest = (re.findall(reduced, text) for text in loops_and_rest(lowered.compile().as_text()))
  assert sum(len(re.findall(table, shapes)) for shapes in rest) == 1
  assert loop and all(str(D) not in re.findall(r"\d+", shapes) for shapes in loop)
  with mesh_of((2, 4, 1)):
    lowered = jax.jit(jax.grad(f, argnums=(0, 1))).lower(*on_mesh(arguments()))
    loop, _ = loops_and_rest(lowered.compile().as_text())
  assert "dot(" in loop and "all-reduce" not in loop


def temporary_bytes(T, chunk, V=131072, D=8):
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, D), (V, D), (1, T), (1, T))]
  arrays[2] = arrays[2].update(dtype=jnp.int32)
  f = jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=chunk)[0], argnums=(0, 1))
  return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_chunk_and_not_with_the_sequence():
  logits = 4 * 64 * 131072
  short, long = temporary_bytes(256, chunk=64), temporary_bytes(4096, chunk=64)
  assert long < 1.1 * short < 4 * logits
  assert temporary_bytes(4096, chunk=None) > 64 * logits
  assert temporary_bytes(4096, chunk=128) - long > logits
