"""State in the host's memory: the same run, bit for bit, and arrays that lie where they should."""

import dataclasses

import jax
import numpy as np
import pytest

from bigtrain.mesh import Mesh
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.muon import Muon
from bigtrain.optim.on_host import HOST
from bigtrain.optim.schedule_free import ScheduleFreeAdamW
from bigtrain.run import load_run
from bigtrain.train import train
from tests import packed, runs

MESH = Mesh(data=2, fsdp=2, tensor=2)
OPTIMIZERS = {
  "adamw": AdamW(lr=0.1, average=0.9),
  "muon": Muon(lr=0.02),
  "schedule_free": ScheduleFreeAdamW(lr=0.1),
}


def on_host(e):
  return dataclasses.replace(e, optimizer_on_host=True)


@pytest.mark.parametrize("meshed", [True, False], ids=["mesh", "one device"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_updates_are_those_of_a_state_on_the_device(name, meshed):
  e = packed.experiment(optimizer=OPTIMIZERS[name], mesh=MESH, steps=2)
  state = packed.start(e)
  wanted = packed.run(e, state, meshed=meshed)
  got = packed.run(on_host(e), state, meshed=meshed)
  assert set(packed.distances(got, wanted).values()) == {0.0}


def test_every_array_of_the_state_waits_on_the_host_and_all_else_does_not():
  e = on_host(packed.experiment(optimizer=OPTIMIZERS["adamw"], mesh=MESH, steps=2))
  _, program, step = packed.compiled(e)
  state = program.abstract()
  (taken, _), _ = step.input_shardings
  given, _ = step.output_shardings
  structure = jax.tree.structure(state)
  for places in (taken, given):
    placed = jax.tree.unflatten(structure, places)
    sent = {x.ndim > 0: p.memory_kind for x, p in pairs(state.optimizer, placed.optimizer)}
    assert sent == {True: HOST, False: "device"}
    assert {p.memory_kind for p in jax.tree.leaves(placed.model)} == {"device"}


def pairs(*trees):
  return zip(*map(jax.tree.leaves, trees), strict=True)


@pytest.mark.usefixtures("prepared")
def test_a_run_goes_on_from_its_checkpoint_and_evaluates_the_average(tmp_path):
  e = on_host(runs.base())
  plain = train(runs.base(), tmp_path / "plain")
  first = train(dataclasses.replace(e, steps=20), tmp_path / "whole")
  (tmp_path / "whole" / "checkpoints" / "20").rename(tmp_path / "gone")
  again = train(dataclasses.replace(e, steps=20), tmp_path / "whole")
  loaded = load_run(tmp_path / "whole")
  for run in (first, again, loaded):
    for x, y in pairs(plain.weights, run.weights):
      np.testing.assert_array_equal(x, y)
  assert loaded.evaluate() == pytest.approx(plain.evaluate(), rel=1e-6)
