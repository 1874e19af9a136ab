"""One update: its sums over microbatches, its types, and the batches that it takes."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from bigtrain.config import config
from bigtrain.data.stages import Stages
from bigtrain.experiment import ObjectiveConfig
from bigtrain.mesh import Mesh
from bigtrain.objectives import Output
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from bigtrain.train import train
from tests import packed

MESH = Mesh(data=2, fsdp=2, tensor=2)
OPTIMIZERS = {
  "sgd": SGD(lr=0.1, momentum=0.0, clip=None),
  "momentum": SGD(lr=0.1, average=0.9),
  "nesterov": SGD(lr=0.1, nesterov=True, weight_decay=0.1),
  "adamw": AdamW(lr=0.1, average=0.9),
}


def calm(**fields):
  """Without dropout, whose key differs by microbatch."""
  fields = {"optimizer": SGD(lr=0.3, schedule=Constant()), "batch": 16, "steps": 2} | fields
  return packed.experiment(model={"dropout": 0.0}, attention={"dropout": 0.0}, **fields)


@pytest.mark.parametrize("meshed", [False, True], ids=["one device", "mesh"])
def test_microbatches_of_unequal_token_counts_equal_the_whole_batch(meshed):
  e = calm()
  tokens = e.data.make(e.seed).batch(0, 16)["weights"].reshape(4, 4, -1).sum((0, 2))
  assert len(set(tokens.tolist())) > 1  # Of microbatch m: rows m, m + 4, ...
  state = packed.start(e)
  wanted, metrics = packed.run(e, state, meshed=False)
  split = dataclasses.replace(e, microbatches=4, mesh=MESH)
  got, split_metrics = packed.run(split, state, meshed=meshed)
  distances = packed.distances((got, split_metrics), (wanted, metrics))
  assert {k: d for k, d in distances.items() if not d <= 1e-5} == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_step_returns_a_state_of_the_types_that_it_took(optimizer):
  e = packed.experiment(optimizer=optimizer, mesh=MESH)
  with jax.set_mesh(mesh := e.mesh.make()):
    program = Program(e, mesh)
    state = program.abstract()
    batch = packed.abstract_batch(e)
    after, _ = jax.eval_shape(program.step, state, batch)

  def types(state):
    spec = lambda x: tuple(x.sharding.spec) if x.sharding else ()
    padded = lambda x: spec(x) + (None,) * (x.ndim - len(spec(x)))
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(p): (x.shape, x.dtype, x.weak_type, padded(x)) for p, x in leaves}

  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert types(after) == types(state)


def test_the_compiled_step_keeps_every_array_where_it_lies():
  e = calm(microbatches=4, mesh=MESH)
  _, program, step = packed.compiled(e)
  (state_in, _), _ = step.input_shardings
  state_out, _ = step.output_shardings
  for x, a, b in zip(jax.tree.leaves(program.abstract()), state_in, state_out, strict=True):
    assert a.is_equivalent_to(b, x.ndim)


def test_a_batch_of_padding_alone_has_no_gradient():
  e = calm()
  _, _, step = packed.compiled(e, meshed=False)
  state = packed.start(e)
  batch = e.data.make(0).batch(0, 16)
  batch |= {name: np.zeros_like(batch[name]) for name in ("weights", "segments", "positions")}
  leaves, structure = jax.tree.flatten(jax.device_put(state))
  leaves, metrics = step(leaves, jax.device_put(batch))
  after = jax.tree.unflatten(structure, jax.device_get(leaves))
  assert metrics["gradient_norm"] == metrics["weight"] == 0
  chex.assert_trees_all_equal(after.model, jax.device_get(state.model))


def test_no_step_draws_from_a_key_of_initialisation():
  keys = []

  @config
  class Keys(ObjectiveConfig):
    def __call__(self, model, batch, key):
      keys.append(jax.random.key_data(key).tolist())
      zero = sum(x.sum() for x in jax.tree.leaves(model)) * 0
      return Output(zero, batch["weights"].sum(), {})

  e = dataclasses.replace(calm(), objective=Keys())
  state, batch = jax.device_put(packed.start(e)), e.data.make(0).batch(0, 16)
  for _ in range(5):
    state, metrics = Program(e, None).step(state, batch)
  split = jax.random.key_data(jax.random.split(jax.random.key(e.seed), 5)).tolist()
  assert len({*map(tuple, keys + split)}) == 10
  assert metrics["loss"] == 0  # Also of an objective that names no loss.


def test_batches_and_data_change_at_their_steps_and_each_new_shape_is_announced(tmp_path):
  data = Stages(stages=((0, packed.Packed()), (3, packed.Packed(seq=14))))
  e = calm(data=data, batch=8, batch_stages=((2, 16),), steps=5, mesh=Mesh(data=8, fsdp=1))
  e.model.layers = 1
  run = train(e, tmp_path / "run", quiet=True)
  assert int(run.state.example) == 2 * 8 + 3 * 16
  made, wanted = e.data.make(e.seed), []
  for step, (example, size) in enumerate([(0, 8), (8, 8), (16, 16), (32, 16), (48, 16)]):
    wanted.append(made.stage(step).batch(example, size)["weights"].sum())
  assert run.metrics["weight"].tolist() == wanted
  events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
  shapes = [event["shapes"]["tokens"] for event in events if event["event"] == "compile"]
  assert shapes == [[8, 11], [16, 11], [16, 14]]


def test_epochs_become_the_steps_that_go_through_the_examples(tmp_path, monkeypatch):
  monkeypatch.setattr(packed.PackedData, "examples", lambda self: 20)
  e = dataclasses.replace(calm(), steps=0, epochs=1.5, batch=8, mesh=Mesh(data=8, fsdp=1))
  run = train(e, tmp_path, quiet=True)
  assert run.experiment.steps == run.state.step == 4  # 30 examples, 8 at a time.
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 4
  assert train(e, tmp_path, quiet=True).state.step == 4  # The same command goes on with it.
