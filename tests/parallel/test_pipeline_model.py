"""A whole model on stages: one device's numbers, layers where they belong, nothing sent in vain."""

import dataclasses
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import Checkpoints, sharding
from bigtrain.checkpoint import Store
from bigtrain.mesh import Mesh
from bigtrain.optim.muon import Muon
from bigtrain.parallel.pipeline import Pipeline
from bigtrain.program import Program
from bigtrain.run_directory import RunDirectory
from bigtrain.saved import Saved
from bigtrain.state import combine
from bigtrain.validate import validate
from tests import packed
from tests.collectives import Collective, collectives
from tests.conftest import HAS_EMITTERS
from tests.fields import FieldTest
from tests.packed import ADAMW, B, D, F, G, H, K, T, V, assert_equal
from tests.probes import PROBES
from tests.test_collectives import SMALL

LAYERS, STAGES, MICROBATCHES = 4, 2, 4
ALL = Mesh(pipeline=STAGES, fsdp=2, tensor=2)


def experiment(mesh: Mesh, *, model=None, optimizer=ADAMW, **schedule):
  c = Pipeline(**{"microbatches": MICROBATCHES, **schedule})
  model = {"layers": LAYERS, "pipeline": c, "drop_path": 0.1, **(model or {})}
  return packed.experiment(optimizer=optimizer, mesh=mesh, model=model, steps=2)


def assert_like_one_device(e):
  validate(e, devices=8)
  state = packed.start(e)
  assert_equal(e, packed.run(e, state), packed.run(e, state, meshed=False))


def test_two_updates_in_two_rounds_with_dropout_equal_one_device():
  assert_like_one_device(experiment(ALL, rounds=2))


def test_blockwise_attention_drops_in_a_stage_what_one_device_drops():
  e = experiment(ALL)
  e.model.pattern[0].attention.kernel = "blockwise"
  assert_like_one_device(e)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mesh", "schedule"),
  [
    (Mesh(pipeline=2, data=4, fsdp=1), {"microbatches": 2}),
    (Mesh(pipeline=4, fsdp=2), {"microbatches": None}),
    (Mesh(pipeline=2, fsdp=1, tensor=4), {"microbatches": 8}),
    (Mesh(pipeline=2, fsdp=2, tensor=2), {"keep": "stages"}),
  ],
  ids=str,
)
def test_two_updates_on_other_meshes_equal_one_device(mesh, schedule):
  assert_like_one_device(experiment(mesh, **schedule))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "products"])
def test_two_updates_that_keep_more_equal_one_device(remat):
  assert_like_one_device(experiment(ALL, model={"remat": remat}))


@pytest.mark.slow
def test_blocks_before_and_behind_the_stages_equal_one_device():
  e = experiment(ALL)
  (block,) = e.model.pattern
  windowed = dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=3))
  e.model.first, e.model.pattern, e.model.layers = (block,), (windowed, block), 6
  assert [n for _, n in e.model.segments()] == [1, 2, 1]
  assert_like_one_device(e)


@pytest.mark.slow
def test_muon_on_stages_equals_one_device():
  e = experiment(Mesh(pipeline=2, fsdp=4), optimizer=Muon(lr=0.02), microbatches=2)
  assert_like_one_device(e)


def implied() -> Counter[Collective]:
  """All transfers of more than SMALL elements of one step in two rounds, on one device.

  - fsdp gathers each weight of a layer when a stage applies it, and once more in the backward pass;
    it scatters its gradient. To the table `pipeline` is more fsdp.
  - tensor adds up activations of a microbatch: two in the forward pass, one of them again when that
    is repeated, two in the backward pass; those of the embedding and before the logits of all rows.
  - between stages, permutations alone: of what has been done and of what waits, forward and back,
    in the ticks and behind the last; and of each group of layers to its stage and back.
  """
  f, t = 2, 2
  weights = [D * K * G * H // t] * 2 + [D * K * H // t] * 2 + [D * F // t] * 3
  table, rows = V * D // t, B * T * D // (STAGES * f)
  of_microbatch = B * T * D // (MICROBATCHES * f)
  found = Counter()
  found.update(Collective("all-gather", ("fsdp",), n) for n in [*weights, *weights])
  found.update(Collective("reduce-scatter", ("fsdp",), n // f) for n in weights)
  for axis, n in (("fsdp", table // 2), ("pipeline", table)):
    found[Collective("all-gather", (axis,), n)] += 1
  for axis, n in (("pipeline", table // 2), ("fsdp", table // 4)):
    found[Collective("reduce-scatter", (axis,), n)] += 2
  found[Collective("all-reduce", ("tensor",), of_microbatch)] += 2 + 1 + 2
  found[Collective("all-reduce", ("tensor",), rows)] += 1 + 1
  return found


def test_a_step_has_the_collectives_that_the_design_implies_and_no_other():
  mesh, _, step = packed.compiled(experiment(ALL, rounds=2), meshed=True)
  large = Counter(c for c in collectives(step, mesh) if c.elements > SMALL)
  moved = {c for c in large if c.kind == "collective-permute"}
  assert {c: n for c, n in large.items() if c not in moved} == implied()
  weights = {n // 4 for n in (D * K * G * H, D * K * H, D * F)}  # Of a layer, on one device.
  microbatch = B * T * D // (MICROBATCHES * 2)
  assert {c.elements for c in moved} == {microbatch, *(n * LAYERS // 4 for n in weights)}


def test_each_stage_has_its_layers_and_their_optimizer_state_alone():
  e = experiment(Mesh(pipeline=4, fsdp=2))
  with jax.set_mesh(mesh := e.mesh.make()):
    state = Program(e, mesh).abstract()
  of_stacks = lambda tree: [x for x in jax.tree.leaves(tree) if x.shape[:1] == (LAYERS,)]
  stacked = of_stacks(state.model)
  assert len(stacked) == len(jax.tree.leaves(state.model.transformer))
  assert len(of_stacks(state.optimizer)) == 3 * len(stacked)  # Two moments and an average.
  held = {x.sharding.shard_shape(x.shape)[0] for x in of_stacks((state.model, state.optimizer))}
  assert held == {LAYERS // 4}
  # What is not of a stack is spread over stages too.
  (embed,) = jax.tree.leaves(state.model.embed_VD)
  assert embed.sharding.shard_shape(embed.shape) == (V, D // 8)


def test_initialisation_gives_the_same_bits_on_stages(monkeypatch):
  # As it is compiled for training: conftest.py leaves out of other programs what rounds alike.
  as_trained, compiled = {"xla_cpu_use_fusion_emitters": True}, jax.stages.Lowered.compile
  more = as_trained if HAS_EMITTERS else {}
  compile_ = lambda self, compiler_options: compiled(self, compiler_options | more)
  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
  e = experiment(ALL)
  alone = Program(e, None).compile_init()(jax.random.key(7))
  with jax.set_mesh(mesh := e.mesh.make()):
    staged = Program(e, mesh).compile_init()(jax.random.key(7))
  chex.assert_trees_all_equal(jax.device_get(staged), jax.device_get(alone))


def test_a_checkpoint_of_stages_restores_without_them_and_back(tmp_path):
  def abstract(mesh):
    e = experiment(mesh)
    with jax.set_mesh(mesh := e.mesh.make()):
      return e, Program(e, mesh).abstract()

  r = np.random.default_rng(0)
  (e, staged), (_, flat) = abstract(ALL), abstract(Mesh(fsdp=4, tensor=2))
  state = jax.tree.map(lambda x: r.normal(size=x.shape).astype(x.dtype), staged)
  for like in (staged, flat, staged):
    places = jax.tree.map(lambda x: x.sharding, like)
    path = RunDirectory(tmp_path / str(like is flat)).checkpoints
    other = flat if like is staged else staged
    with Store(path, Checkpoints()) as store:
      if not store.steps():
        store.save(1, jax.device_put(state, places), e)
    restored = Saved(path).restore(1, other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)


@pytest.mark.slow
def test_layers_report_in_the_order_of_depth():
  e = experiment(ALL, rounds=2, model={"dropout": 0.0, "drop_path": 0.0}, microbatches=2)
  (block,) = e.model.pattern
  block.attention.dropout = 0.0
  data = e.data.make(0).batch(0, B)

  def layers(mesh):
    with packed.in_mesh(mesh):
      program = Program(e, mesh)
      state = jax.device_put(
        packed.start(e), jax.tree.map(lambda x: x.sharding, program.abstract()) if mesh else None
      )
      batch = jax.device_put(data, sharding.batch_sharding())
      return jax.device_get(
        jax.jit(lambda s, b: program.step(s, b, statistics=True))(state, batch)[1]["layers"]
      )

  got, wanted = layers(e.mesh.make()), layers(None)
  assert got.keys() == wanted.keys()
  for name, value in wanted.items():
    if name.split("/")[0] in ("gradient", "parameter", "update", "score_max"):
      np.testing.assert_allclose(got[name], value, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_decoding_with_a_cache_equals_one_device():
  e = experiment(ALL)
  tokens_BT = jnp.asarray(e.data.make(0).batch(0, B)["tokens"])
  state = packed.start(e)

  def decoded(mesh):
    with packed.in_mesh(mesh):
      abstract = Program(e, mesh).abstract()
      place = jax.tree.map(lambda x: x.sharding, abstract.model) if mesh else None
      model = combine(jax.device_put(state.model, place), state.variables)
      tokens = jax.device_put(tokens_BT, sharding.batch_sharding())
      positions = jnp.zeros_like(tokens) + jnp.arange(T)
      return jax.jit(lambda m, t, p: m.decode(t, p, m.cache(B, T))[0])(model, tokens, positions)

  np.testing.assert_allclose(decoded(e.mesh.make()), decoded(None), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_setting_of_the_pipeline_changes_the_step():
  e = experiment(ALL, microbatches=2)
  e.model.layers = 8
  looks = FieldTest({"step": PROBES["step"]}, devices=8)
  assert looks.dead(e, "model.pipeline") == [] and not looks.untried
