"""Weight products in eight bits: against numpy, on meshes, through training and back from disk."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import P

from bigtrain import marks, sharding
from bigtrain.config import Refused
from bigtrain.data.feed import put
from bigtrain.mesh import Mesh
from bigtrain.models.mlp import MLPConfig
from bigtrain.precision import project
from bigtrain.products import Current, Delayed, Gradients, Products
from bigtrain.program import Program
from bigtrain.quantized import TOP
from bigtrain.validate import validate
from tests import packed

FLOAT8 = {"format": "float8_e4m3fn", "gradients": Gradients(format="float8_e5m2")}
TENSOR = Current(scales="tensor")
FORMS = {
  "int8": Products(),
  "int8 tensor": Products(scaling=TENSOR),
  "float8": Products(**FLOAT8),
  "float8 delayed": Products(**FLOAT8, scaling=Delayed(history=4)),
}
AMAX = np.float32([2.5, 2.0, 9.0])  # Less than the largest numbers of x below: those are cut.


def rounded(form, x, axis, amax=None):
  """(what eight bits hold, scale) in numpy, from the definition."""
  seen = np.abs(x).max(axis=axis, keepdims=True) if amax is None else np.full((1, 1), amax)
  scale = np.float32(seen / np.float32(TOP[form]))
  x = x * (np.float32(1) / scale)
  x = x if amax is None else np.clip(x, -TOP[form], TOP[form])
  q = np.round(x) if form == "int8" else x.astype(getattr(ml_dtypes, form))
  return q.astype(np.float64), scale.astype(np.float64)


def reference(c, x, w, g):
  """y, dx and dw in float64 from the rounded operands, whose rounding is in float32."""
  channel = isinstance(c.scaling, Current) and c.scaling.scales == "channel"
  ax, aw, ag = AMAX if isinstance(c.scaling, Delayed) else (None,) * 3
  axes = (1, 0) if channel else (None, None)
  (xq, xs), (wq, ws) = rounded(c.format, x, axes[0], ax), rounded(c.format, w, axes[1], aw)
  g, y = g.astype(np.float32), xq @ wq * xs * ws
  if c.gradients is None:
    return y, g @ (wq * ws).T, (xq * xs).T @ g
  if not channel:
    gq, gs = rounded(c.gradients.format, g, None, ag)
    dw = (xq * xs).T @ (gq * gs if c.gradients.weights else g)
    return y, gq @ wq.T * gs * ws, dw
  of_dx, sx = rounded(c.gradients.format, g * np.float32(ws), 1)
  of_dw, sw = rounded(c.gradients.format, g * np.float32(xs), 0)
  dw = xq.T @ of_dw * sw if c.gradients.weights else (xq * xs).T @ g
  return y, of_dx @ wq.T * sx, dw


def marked(w, c):
  amax = jnp.asarray(AMAX) if isinstance(c.scaling, Delayed) else None
  return nnx.Param(marks.Low(w, amax, c))


@pytest.mark.parametrize(
  "c",
  [
    *FORMS.values(),
    Products(gradients=None),
    Products(gradients=Gradients(weights=False)),
    Products(scaling=TENSOR, gradients=Gradients(weights=False)),
    Products(scaling=Delayed()),
  ],
  ids=str,
)
def test_products_and_gradients_are_those_of_the_rounded_operands(c):
  r = np.random.default_rng(0)
  x, w, g = (r.normal(size=s).astype(np.float32) for s in ((12, 16), (16, 6), (12, 6)))
  w *= np.exp(r.normal(size=(1, 6))).astype(np.float32)  # Columns of several sizes.

  def pulled(x_BTD, w_DKH):
    y, pull = jax.vjp(lambda x, w: project("BTD,DKH->BTKH", x, marked(w, c)), x_BTD, w_DKH)
    return y, *pull(jnp.reshape(g, y.shape))

  found = jax.jit(pulled)(x.reshape(3, 4, 16), w.reshape(16, 2, 3))
  for got, wanted in zip(found, reference(c, x, w, g), strict=True):
    wanted = wanted.reshape(got.shape)
    # Where float32 lies between two numbers of eight bits, either may be taken.
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)


def of_ones(c, x=1.0, g=1.0):
  """y, dx and dw of arrays of ones, but for the first row of x and of the gradient."""
  x_BD = jnp.ones((4, 16)).at[0].set(x)
  product = lambda x, w: project("BD,DF->BF", x, marked(w, c))
  y_BF, pull = jax.vjp(product, x_BD, jnp.ones((16, 6)))
  return y_BF, *pull(jnp.ones_like(y_BF).at[0].set(g))


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-37, 1e-34, 1e-30])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_tiny_gradients_is_a_row_of_numbers(form, size):
  _, dx_BD, dw_DF = of_ones(FORMS[form], g=size)
  np.testing.assert_allclose(dx_BD[0], 0.0, atol=1e-20)
  np.testing.assert_allclose(dx_BD[1:], 6.0, rtol=0.1)
  np.testing.assert_allclose(dw_DF, 3.0, rtol=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("c", [*FORMS.values(), Products(scaling=Delayed())], ids=str)
def test_what_is_no_number_is_none_behind_a_product(c, bad):
  y_BF, *_ = of_ones(c, x=bad)
  _, dx_BD, dw_DF = of_ones(c, g=bad)
  assert not any(np.isfinite(a[0]).any() for a in (y_BF, dx_BD, dw_DF))


def test_the_gradient_of_delayed_scales_is_what_the_product_has_met():
  c, r = FORMS["float8 delayed"], np.random.default_rng(0)
  x, w, g = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((8, 16), (16, 6), (8, 6)))
  of = lambda amax: project("BD,DF->BF", x, nnx.Param(marks.Low(w, amax, c)))
  (seen,) = jax.vjp(of, jnp.asarray(AMAX))[1](g)
  np.testing.assert_array_equal(seen, [np.abs(a).max() for a in (x, w, g)])


def gradient(e, state, meshed=True):
  mesh = e.mesh.make() if meshed else None
  program = Program(e, mesh)

  def of(state, batch):
    amax = marks.largest(state.statistics.get("amax", {}))
    found, output, _ = program.gradient(state.model, state.variables, batch, program.key(0), amax)
    return found, output.loss_sum, output.amax

  with packed.in_mesh(mesh):
    place = jax.tree.map(lambda x: x.sharding, program.abstract()) if meshed else None
    rows = lambda wanted: e.data.make(e.seed).batch(0, e.batch, wanted)
    batch = put(rows, e.batch, sharding.batch_sharding())
    return jax.device_get(jax.jit(of)(jax.device_put(state, place), batch))


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    ("int8", Mesh(fsdp=4, tensor=2, sequence=True)),
    ("float8 delayed", Mesh(data=2, fsdp=2, tensor=2)),
  ],
)
def test_a_mesh_computes_what_one_device_computes(name, mesh):
  """To a number in a thousand of a leaf's norm: a sum in another order may round either way.

  With int32 sums nearly all is equal to 1e-6; a lost or a doubled scale is off by its whole size.
  """
  e = packed.experiment(products=FORMS[name], attention={"dropout": 0.0})
  e.data.seq = 16
  state = packed.start(e)
  wanted = gradient(e, state, meshed=False)
  found = packed.distances(gradient(dataclasses.replace(e, mesh=mesh), state), wanted)
  assert {k: d for k, d in found.items() if not d <= 5e-3} == {}
  assert np.median(list(found.values())) < 1e-6


@pytest.mark.slow
def test_stages_of_a_pipeline_and_rows_that_are_cut_compute_the_same():
  """But the scales of weight gradients, which are of a microbatch."""
  e = packed.experiment(
    products=Products(gradients=Gradients(weights=False)), attention={"dropout": 0.0}
  )
  e.data.seq = 16
  state = packed.start(e)
  wanted = gradient(e, state, meshed=False)
  for mesh in (Mesh(fsdp=2, pipeline=2, tensor=2), Mesh(fsdp=2, context=4)):
    found = packed.distances(gradient(dataclasses.replace(e, mesh=mesh), state), wanted)
    assert {k: d for k, d in found.items() if not d <= 5e-3} == {}


def test_a_product_within_an_island_is_that_outside_of_one():
  c, r = FORMS["int8"], np.random.default_rng(0)
  x, w = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((8, 16), (16, 6)))
  loss = lambda x, w: (project("BD,DF->BF", x, marked(w, c)) ** 2).sum()
  wanted = jax.jit(jax.grad(loss, argnums=0))(x, w)
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    local = jax.shard_map(jax.grad(loss), in_specs=(P("data"), P()), out_specs=P("data"))
    got = jax.jit(local)(jax.device_put(x, P("data")), jax.device_put(w, P()))
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_microbatches_remember_the_largest_magnitude_and_not_their_sum():
  e = packed.experiment(
    products=FORMS["float8 delayed"], model={"dropout": 0.0}, attention={"dropout": 0.0}
  )
  state = packed.start(e)
  whole = gradient(e, state, meshed=False)[2]
  split = gradient(dataclasses.replace(e, microbatches=4), state, meshed=False)[2]
  assert set(whole) == set(state.statistics["amax"]) and len(whole) == 7
  for path, seen in whole.items():
    assert seen.shape == (packed.LAYERS, 3) and (seen > 0).all()
    np.testing.assert_allclose(split[path], seen, rtol=1e-5)


def test_the_histories_hold_the_last_updates_and_are_part_of_the_state():
  e = packed.experiment(products=FORMS["float8 delayed"], steps=3)
  state, metrics = packed.run(e, packed.start(e), meshed=False)
  for seen in state.statistics["amax"].values():
    assert (seen[..., :3] > 0).all() and (seen[..., 3:] == 0).all()
  assert metrics[2]["loss"] < metrics[0]["loss"]
  assert "amax" not in packed.start(packed.experiment(products=Products())).statistics


def test_what_is_no_number_shows_in_its_step_and_in_no_later_scale():
  """One weight was infinite for an update: of x, w and gradients, all that met it."""
  e = packed.experiment(
    products=Products(format="float8_e4m3fn", gradients=None, scaling=Delayed(history=2)),
    model={"dropout": 0.0},
    attention={"dropout": 0.0},
  )
  step = jax.jit(Program(e, None).step)
  batch = e.data.make(0).batch(0, e.batch)
  before, _ = step(jax.device_put(packed.start(e)), batch)
  broken = jax.tree.map(lambda w: w.at[(0,) * w.ndim].set(jnp.inf), before.model)
  after, metrics = step(dataclasses.replace(before, model=broken), batch)
  assert not np.isfinite(metrics["loss"])
  for path, seen in after.statistics["amax"].items():
    np.testing.assert_array_equal(seen, before.statistics["amax"][path])  # The guard's doing.
  _, metrics = step(dataclasses.replace(after, model=before.model), batch)
  assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
  met = marks.followed({"w": jnp.ones((3, 2))}, {"w": jnp.array([jnp.inf, jnp.nan, 2.0])})
  np.testing.assert_array_equal(met["w"], [[1, 1], [1, 1], [2, 1]])


def test_tables_routers_heads_and_what_is_named_stay_high():
  e = packed.experiment(products=Products(high=("attention",)))
  module = marks.low(e.products, e.model.make(jax.random.key(0)), {})
  low = [
    jax.tree_util.keystr(path)
    for path, w in jax.tree.leaves_with_path(module, is_leaf=lambda x: isinstance(x, nnx.Param))
    if marks.low_of(w) is not None
  ]
  assert len(low) == 3 and all("feed_forward" in path for path in low)


def test_what_cannot_be_is_refused():
  e = packed.experiment(products=Products(high=("attenton",)))
  with pytest.raises(Refused, match=r"found in no product's path; there is .*attention"):
    Program(e, None).abstract()
  table_alone = MLPConfig(inputs=4, hidden=(), classes=3).make(jax.random.key(0))
  with pytest.raises(Refused, match="no weight of a MLP goes through"):
    marks.low(Products(), table_alone, {})
  with pytest.raises(Refused, match="cannot be multiplied with gradients in int8"):
    Products(format="float8_e4m3fn").check()
  with pytest.raises(Refused, match="no regular expression"):
    Products(high=("(",)).check()
  e = packed.experiment(products=FORMS["float8 delayed"], mesh=Mesh(fsdp=1, pipeline=2))
  with pytest.raises(Refused, match="cannot be within the 2 stages"):
    validate(e, 2)
