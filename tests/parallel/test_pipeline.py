"""The schedule, and the ring of microbatches, by toy stages: affine maps that do not commute.

Dims: S stage, R round, L layer (of all), B row, T position, D model, F hidden.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from bigtrain import sharding
from bigtrain.config import Refused
from bigtrain.dropout import dropout
from bigtrain.mesh import Mesh
from bigtrain.parallel import pipeline
from bigtrain.parallel.pipeline import Pipeline, Schedule
from bigtrain.validate import remarks, validate
from tests import packed
from tests.collectives import collectives

B, T, D, F = 16, 2, 4, 6
# Stages, microbatches, rounds, layers of a stage in a round: as many microbatches as stages and
# more; rounds that divide the stages, that stages divide, and neither.
CASES = [(2, 2, 1, 1), (2, 8, 2, 1), (4, 8, 2, 2), (4, 4, 4, 1), (4, 16, 3, 1), (8, 8, 1, 1)]


def test_stages_take_items_in_turn_and_rounds_follow_each_other():
  table = Schedule(stages=2, microbatches=4, rounds=2).table()
  assert table.T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, -1], [-1, 0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(("S", "M", "R"), [(2, 4, 1), (4, 8, 1), (4, 8, 3), (4, 4, 2)])
def test_no_layer_is_wanted_before_the_one_below_it_is_done(S, M, R):
  at = {
    (item, s): tick for (tick, s), item in np.ndenumerate(Schedule(S, M, R).table()) if item >= 0
  }
  assert len(at) == S * M * R
  for (item, s), tick in at.items():
    below = (item, s - 1) if s else (item - M, S - 1)
    assert below[0] < 0 or at[below] < tick


@pytest.mark.parametrize(("S", "M", "R"), [(2, 2, 1), (4, 16, 1), (8, 32, 4)])
def test_the_bubble_is_that_of_the_papers(S, M, R):
  # Narayanan 2021, section 2.2: the time lost over the time of the work itself.
  plan = Schedule(S, M, R)
  assert plan.bubble() / (1 - plan.bubble()) == pytest.approx((S - 1) / (R * M))
  assert plan.bubble() == pytest.approx(np.mean(plan.table() < 0))


def affine(layers_L, x_BTD, row_B, add):
  """x -> 0.9 x + w + row + add of each layer in turn."""

  def layer(x_BTD, w):
    found = {"max/layer": x_BTD.max(), "/layer": w, "same/layer": jnp.ones(())}
    return 0.9 * x_BTD + w + row_B[:, None, None] + add, found

  return jax.lax.scan(layer, x_BTD, layers_L)


def problem(layers: int):
  r = np.random.default_rng(0)
  draw = lambda *shape: r.uniform(size=shape).astype(
    np.float32
  )  # All of one sign: well-conditioned.
  return draw(layers), draw(B, T, D), draw(B), draw()


def laid(w_L, x_BTD, row_B, add):
  """Layers on stages, and rows over all axes of the batch."""
  place = lambda x, spec: jax.device_put(x, spec)
  lay_L = lambda w: place(w, P("pipeline"))
  rows = sharding.act("B")
  return jax.tree.map(lay_L, w_L), place(x_BTD, rows), place(row_B, rows), place(add, P())


@pytest.mark.parametrize(("S", "M", "R", "L"), CASES)
def test_rows_pass_all_layers_in_the_order_of_depth_and_gradients_come_back(S, M, R, L):
  def loss(run, w_L, x_BTD, row_B, add):
    y_BTD, found = run(w_L, x_BTD, row_B, add)
    return jnp.sum(y_BTD**2), (y_BTD, found)

  grad = lambda run: jax.value_and_grad(
    functools.partial(loss, run), argnums=(0, 1, 2, 3), has_aux=True
  )
  args = problem(S * R * L)
  (_, (y_BTD, found)), gradients = jax.jit(grad(affine))(*args)
  c = Pipeline(microbatches=M, rounds=R, keep="stages" if R == 2 else "layers")
  staged = lambda *args: pipeline.run(affine, c, (), *args)
  with jax.set_mesh(Mesh(pipeline=S, fsdp=8 // S).make()):
    (_, (y, reports)), g = jax.jit(grad(staged))(*laid(*args))
  np.testing.assert_allclose(y, y_BTD, rtol=1e-6)
  for name in found:
    np.testing.assert_allclose(reports[name], found[name], rtol=1e-6)
  assert max(packed.distances(g, gradients).values()) < 1e-5
  assert g[0].sharding.spec == P("pipeline")


def test_the_ticks_that_run_and_those_in_which_a_stage_works_are_those_of_the_schedule():
  S, M, R = 4, 8, 2
  count = lambda layers_L, x_BTD, of_rows, of_all: (x_BTD + len(layers_L), {})
  run = lambda *args: pipeline.run(count, Pipeline(microbatches=M, rounds=R), (), *args)[0]
  w_L, x_BTD, *rest = problem(S * R)
  with jax.set_mesh(Mesh(pipeline=S, fsdp=2).make()):
    args = laid(w_L, 0 * x_BTD, *rest)
    text, y_BTD = str(jax.make_jaxpr(run)(*args)), jax.jit(run)(*args)
  ticks = max(int(n) for n in re.findall(r"length=(\d+)", text))
  worked = np.sum(y_BTD[:, 0, 0]) / (B // M)  # Each item adds 1 to each of its rows.
  assert Schedule(S, M, R).bubble() == pytest.approx(1 - worked / (S * ticks))


def test_islands_in_a_stage_are_islands_over_all_stages():
  # A product over tensor, weights gathered and gradients scattered over fsdp, rows exchanged.
  def exchange(x_BTD, up_DF, down_FD):
    up_DF = jax.lax.all_gather(up_DF, "fsdp", axis=0, tiled=True)
    x_BTD = jax.lax.all_to_all(x_BTD, "fsdp", split_axis=1, concat_axis=0, tiled=True)
    y_BTD = jax.lax.psum(jnp.tanh(x_BTD @ up_DF) @ down_FD, "tensor")
    return jax.lax.all_to_all(y_BTD, "fsdp", split_axis=0, concat_axis=1, tiled=True)

  def stage(layers, x_BTD, row_B, add, *, island):
    def layer(x_BTD, w):
      up_DF, down_FD = w
      if island:
        y_BTD = sharding.island(exchange, jax.typeof(x_BTD).sharding.spec, x_BTD)(x_BTD, *w)
      else:
        y_BTD = jnp.tanh(x_BTD @ up_DF) @ down_FD
      return x_BTD + y_BTD, {}

    return jax.lax.scan(jax.checkpoint(layer), x_BTD, layers)

  def loss(run, *args):
    return jnp.sum(jnp.sin(run(*args)[0]))

  grad = lambda run: jax.grad(functools.partial(loss, run), argnums=(0, 1))
  r, (_, *rest) = np.random.default_rng(1), problem(4)
  w_L = tuple(r.normal(0, 0.3, size).astype(np.float32) for size in ((4, D, F), (4, F, D)))
  wanted = jax.jit(grad(functools.partial(stage, island=False)))(w_L, *rest)
  staged = functools.partial(stage, island=True)
  run = lambda *args: pipeline.run(staged, Pipeline(microbatches=4), (), *args)
  with jax.set_mesh(mesh := Mesh(pipeline=2, fsdp=2, tensor=2).make()):
    w_L = map(jax.device_put, w_L, (P("pipeline", "fsdp", "tensor"), P("pipeline", "tensor")))
    args = (*w_L,), *laid((), *rest)[1:]
    compiled = jax.jit(grad(run)).lower(*args).compile()
    got = compiled(*args)
  assert max(packed.distances(got, wanted).values()) < 1e-5
  # All that crosses stages are permutations: of a microbatch, forward and back.
  across = {c.kind for c in collectives(compiled, mesh) if "pipeline" in c.axes}
  assert across == {"collective-permute"}
  assert any(c.kind == "reduce-scatter" for c in collectives(compiled, mesh))


def test_a_row_draws_the_same_mask_whichever_rows_are_with_it():
  @jax.jit
  def draw(x_BTD, ids_B):
    with sharding.stage(ids_B):
      return dropout(x_BTD, 0.4, jax.random.key(1))

  x_BTD, some = jnp.ones((64, 32, 8)), jnp.array([3, 11, 7])
  drawn_BTD = jax.jit(lambda x: dropout(x, 0.4, jax.random.key(1)))(x_BTD)
  np.testing.assert_array_equal(draw(x_BTD[some], some), drawn_BTD[some])
  assert len(np.unique(drawn_BTD.reshape(64, -1), axis=0)) == 64
  assert np.mean(drawn_BTD == 0) == pytest.approx(0.4, abs=0.01)


def piped(layers=4, mesh=None, batch=16, **fields):
  mesh = mesh or Mesh(pipeline=2, fsdp=4)
  return packed.experiment(
    model={"layers": layers, "pipeline": Pipeline(**fields)}, mesh=mesh, batch=batch
  )


def test_what_stages_cannot_do_is_refused_with_a_remedy():
  refused = functools.partial(pytest.raises, Refused)
  with refused(match="repeated 5 times, which 2 stages do not divide; .*set .*mesh.pipeline = 1"):
    validate(piped(layers=5), devices=8)
  with refused(match="repeated 4 times, which 2 stages times 4 rounds do not divide"):
    validate(piped(rounds=4), devices=8)
  with refused(match="3 microbatches are not a multiple of the 2 stages.*; use 2"):
    validate(piped(microbatches=3), devices=8)
  with refused(match="has 4 rows, which 6 microbatches do not divide; change batch or"):
    validate(piped(microbatches=6), devices=8)
  with refused(match="microbatches is 0; it must be at least 1"):
    validate(piped(microbatches=0), devices=8)
  validate(piped(microbatches=4, rounds=2), devices=8)


def test_the_bubble_is_told_before_training():
  (line,) = remarks(piped(mesh=Mesh(pipeline=4, fsdp=2), microbatches=8))
  assert line == (
    "model.pipeline: each of 4 stages waits 27% of its time, with 8 microbatches in flight and "
    "rounds=1"
  )


def test_as_many_microbatches_as_fit_are_taken_where_nothing_is_said_and_for_odd_batches():
  assert Pipeline().schedule(stages=2, rows=32).microbatches == 8
  assert Pipeline().schedule(stages=2, rows=12).microbatches == 6
  assert Pipeline(microbatches=8).schedule(stages=2, rows=6).microbatches == 6
