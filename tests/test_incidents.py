"""Planted faults: what is found of each, and that every policy trains on as it promises."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from bigtrain import incidents
from bigtrain.data.feed import put
from bigtrain.faults import Faults
from bigtrain.parts import Part
from bigtrain.program import Program
from bigtrain.sharding import batch_sharding
from bigtrain.train import train
from tests import faulty, runs
from tests.faulty import BATCH, Powers

BAD = 10 * BATCH + 3  # An example of step 11, its fourth row.


class Plant(Part):
  """Calls a function of the run before the step that follows so many."""

  def __init__(self, before: int, plant):
    self.before, self.plant = before, plant

  def before_step(self, step):
    if step == self.before:
      self.before = -1  # Once, also if the run goes back.
      self.plant(self.run)


def losses(run_dir) -> list[float]:
  return [row["loss"] for row in runs.read(run_dir, "metrics.jsonl")]


def kept(run_dir, name="00000011"):
  folder = run_dir / "incidents" / name
  return json.loads((folder / "incident.json").read_text()), folder


def by_hand(e, examples, *, lowered_from=None):
  """The losses of updates by the batches that begin at these examples; None for no update."""
  e = dataclasses.replace(e, data=faulty.Points())
  mesh, data, found = e.mesh.make(), e.data.make(e.seed), []
  with jax.set_mesh(mesh):
    program = Program(e, mesh)
    state = jax.jit(program.init)(jax.random.key(e.seed))
    step = jax.jit(program.step)
    low = dataclasses.replace(e, optimizer=dataclasses.replace(e.optimizer, lr=0.05))
    step_low = jax.jit(Program(low, mesh).step)
    for i, example in enumerate(examples):
      if example is None:
        state = dataclasses.replace(state, step=state.step + 1)
        found.append(None)
        continue
      batch = put(lambda rows, at=example: data.batch(at, BATCH, rows), BATCH, batch_sharding())
      update = step_low if lowered_from is not None and i >= lowered_from else step
      state, metrics = update(state, batch)
      found.append(float(metrics["loss"]))
  return found


def close(got, wanted):
  assert len(got) == len(wanted)
  for a, b in zip(got, wanted, strict=True):
    assert (a is None) == (b is None)
    if a is not None:
      np.testing.assert_allclose(a, b, rtol=2e-6)


@pytest.fixture
def unexamined(monkeypatch):
  monkeypatch.setattr(incidents, "EXAMINED", 0)


def trained(e, path, **options):
  run = train(e, path, quiet=True, **options)
  return run.directory.path


# What is found.


def test_nan_in_the_data_is_found_and_its_row_kept(tmp_path):
  path = trained(faulty.nan_in_step_11(), tmp_path / "run")
  about, folder = kept(path)
  assert (about["kind"], about["cause"], about["first_bad"]) == (
    "nonfinite",
    "data",
    "batch/inputs",
  )
  assert about["examples"] == [80, 88] and about["checkpoint"] == 8 and about["policy"] == "skip"
  assert about["loss"] is None and about["rows"][0] == 3 and len(about["rows"]) == BATCH
  assert about["layers"]["batch/labels"] == 2 and about["layers"]["batch/inputs"] is None
  batch = np.load(folder / "batch.npz")
  assert batch["rows"].tolist() == about["rows"] and np.isnan(batch["inputs"][0, 1])
  clean = faulty.Points().make(0).batch(80, BATCH)
  np.testing.assert_array_equal(batch["labels"], clean["labels"][about["rows"]])
  (event,) = runs.events(path, "incident")
  assert event["path"] == "incidents/00000011" and event["cause"] == "data"
  rows = runs.read(path, "metrics.jsonl")
  assert [row["step"] for row in rows if row["skipped"]] == [11]


def plant_nan(run):
  state = run.state
  spoil = lambda w: w.at[(0,) * w.ndim].set(np.nan)
  leaves, structure = jax.tree.flatten(state.model)
  leaves[-1] = jax.jit(spoil)(leaves[-1])
  run.state = dataclasses.replace(state, model=jax.tree.unflatten(structure, leaves))


def planted(kind):
  """An experiment and parts with a fault in step 11; the cause, and what is the first bad tensor."""
  e, parts = faulty.base(), []
  e.data.at, e.steps = (BAD,), 12
  match kind:
    case "huge input":
      e.data.how, e.data.to = "set", -1e30
      return e, parts, "data", "batch/inputs"
    case "label":
      e.data.how = "label"
      return e, parts, "data", "batch/labels"
    case "spike":
      e.data.how, e.data.to = "scale", -60.0
      e.faults = Faults(spike=12.0, window=8)
      return e, parts, "data", "batch/inputs"
    case "parameter":
      e.data.at = ()
      return e, [Plant(10, plant_nan)], "optimizer", "parameter/layers.2.weight"
    case "once":
      e.data.how = "once"
      return e, parts, "hardware", None
    case "half":
      e.model, e.optimizer.lr = Powers(), 0.01
      e.data.how, e.data.to = "scale", 60.0
      return e, parts, "precision", "output/up_IF"
  raise KeyError(kind)


@pytest.mark.parametrize("kind", ["huge input", "label", "spike", "parameter", "once", "half"])
def test_the_cause_of_a_planted_fault_is_told(tmp_path, kind):
  e, parts, cause, first_bad = planted(kind)
  about, _ = kept(trained(e, tmp_path / "run", parts=parts))
  assert (about["cause"], about["first_bad"]) == (cause, first_bad), about
  assert about["kind"] == ("spike" if kind == "spike" else "nonfinite") and about["note"] == ""
