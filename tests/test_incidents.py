"""Planted faults: what is found of each, and that every policy trains on as it promises."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from bigtrain import digest, evidence, examine, self_check
from bigtrain.config import Refused
from bigtrain.data.feed import put
from bigtrain.data.text import TextData
from bigtrain.exit_codes import Exit
from bigtrain.experiment import Checkpoints
from bigtrain.failures import CheckFailed
from bigtrain.faults import Faults
from bigtrain.mesh import Mesh
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


@pytest.mark.usefixtures("prepared")
def test_a_token_that_there_is_none_of_is_found_and_its_text_kept(tmp_path, monkeypatch):
  make, clean = TextData.make, runs.base().data.make(0).batch(80, BATCH)["tokens"]

  def spoilt(self, seed):
    data = make(self, seed)
    whole = data.batch

    def batch(example, size, rows=None):
      wanted = (example + np.arange(size))[rows or slice(None)]
      found = whole(example, size, rows)
      tokens = found["tokens"].copy()
      tokens[wanted == BAD, 2] = 70_000
      return found | {"tokens": tokens}

    data.batch = batch
    return data

  monkeypatch.setattr(TextData, "make", spoilt)
  e = runs.base()
  e.steps = 12
  about, folder = kept(trained(e, tmp_path / "run"))
  assert (about["cause"], about["first_bad"]) == ("data", "batch/tokens")
  assert about["loss"] is None and about["gradient_norm"] > 0 and about["rows"][0] == 3
  first = (folder / "batch.txt").read_text().split("\n---")[0]
  assert first.startswith("--- row 3, document 1, ids that stand for nothing: [70000]\n")
  assert bytes([clean[3, 1], clean[3, 3]]).decode() in first


def plant_nan(run):
  state = run.state
  spoil = lambda w: w.at[(0,) * w.ndim].set(np.nan)
  leaves, structure = jax.tree.flatten(state.model)
  leaves[-1] = jax.jit(spoil)(leaves[-1])
  run.state = dataclasses.replace(state, model=jax.tree.unflatten(structure, leaves))


def planted(kind):
  """An experiment and parts with a fault in step 11; the cause, and the first bad tensor."""
  e, parts = faulty.base(), []
  e.data.at, e.steps, e.faults.examine = (BAD,), 12, 1
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


def test_a_device_that_computes_wrong_is_named_and_ends_the_run_before_it_saves(
  tmp_path, monkeypatch
):
  right = self_check.answers()

  def spoil(run):
    third = jax.devices()[3]
    answers = right | {third: right[third] ^ np.uint32(4)}
    monkeypatch.setattr(self_check, "answers", lambda: answers)

  said = "device 3 .*of process 0 on .*: 0x[0-9a-f]{8} where 0x[0-9a-f]{8} is right"
  with pytest.raises(CheckFailed, match=rf"at step 12 a device computes wrong: {said}"):
    trained(faulty.nan_in_step_11(), tmp_path, parts=[Plant(10, spoil)])
  about, _ = kept(tmp_path)
  assert about["cause"] == "hardware" and about["again"]["devices"].startswith("device 3 ")
  assert runs.saved(tmp_path) == [4, 8]
  (event,) = runs.events(tmp_path, "bad_device")
  assert event["step"] == 12 and "device 3" in event["found"]


@pytest.mark.parametrize("little", [True, False])
def test_a_replica_with_one_other_bit_is_named(tmp_path, monkeypatch, little):
  if not little:
    monkeypatch.setattr(digest, "LITTLE", 0)

  def flip(run):
    leaf = run.leaves[-1]
    mesh = leaf.sharding.mesh
    place = jax.NamedSharding(mesh, jax.P())
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    parts = []
    for i, device in enumerate(mesh.devices.flat):
      mine = whole.copy()
      mine.view(np.uint32)[1, 2] ^= i == 5
      parts.append(jax.device_put(mine, device))
    odd = jax.make_array_from_single_device_arrays(whole.shape, place, parts)
    of_run = type(run).state.fget
    state = lambda run: dataclasses.replace(of_run(run), statistics={"odd": odd})
    monkeypatch.setattr(type(run), "state", property(state))

  e = faulty.base()
  with pytest.raises(CheckFailed, match=r"at step 4 devices that hold .* differ .*device 5 .*odd"):
    trained(e, tmp_path, parts=[Plant(3, flip)])
  assert runs.saved(tmp_path) == []


@pytest.mark.parametrize("little", [True, False])
def test_replicas_are_those_of_the_same_part(monkeypatch, little):
  if not little:
    monkeypatch.setattr(digest, "LITTLE", 0)
  mesh = Mesh(data=4, fsdp=2).make()
  place = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
  with jax.set_mesh(mesh):
    right = jax.device_put(np.arange(40, dtype=np.float32).reshape(5, 8), place)
    each = {shard.device: np.array(shard.data) for shard in right.addressable_shards}
    each[bad := mesh.devices.flat[6]][2, 3] += 1
    parts = [jax.device_put(x, device) for device, x in each.items()]
    odd = jax.make_array_from_single_device_arrays(right.shape, place, parts)
    whole = jax.device_put(np.arange(8), jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    assert self_check.differing({"right": right, "whole": whole}) == {}
    found = self_check.differing({"right": right, "odd": odd, "whole": whole})
  assert found == {bad: "odd"}


def test_who_asks_for_no_self_check_has_none(tmp_path, monkeypatch):
  monkeypatch.setattr(self_check, "wrong", lambda: {jax.devices()[0]: "planted"})
  e = faulty.base()
  with pytest.raises(CheckFailed, match=r"at step 0 .*planted.*experiment.faults.self_check = Fal"):
    trained(e, tmp_path)
  e.steps, e.faults.self_check = 2, False
  trained(e, tmp_path)


def test_devices_are_outvoted_by_the_majority():
  assert self_check.outvoted({"a": 1, "b": 1, "c": 2}) == ["c"]
  assert self_check.outvoted({"a": 1, "b": 2}) == ["a", "b"]
  assert self_check.outvoted({"a": 1, "b": 1}) == []


def test_all_devices_here_know_the_answers():
  assert self_check.wrong() == {}


def test_an_examination_that_fails_ends_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(examine, "Check", lambda *_: 1 / 0)
  monkeypatch.setattr(evidence, "keep_batch", lambda *_: 1 / 0)
  path = trained(faulty.nan_in_step_11(), tmp_path / "run")
  (event,) = runs.events(path, "incident")
  assert "the examination failed: ZeroDivisionError" in event["note"]
  assert "its batch could not be kept: ZeroDivisionError" in event["note"]
  assert event["cause"] == "unknown" and losses(path)[-1] is not None
  assert kept(path)[0]["note"] == event["note"]


@pytest.mark.parametrize(
  ("seen", "cause"),
  [
    ({"devices": "device 3"}, "hardware"),
    ({"inputs": "batch/x", "state": "parameter/w"}, "data"),
    ({"state": "parameter/w"}, "optimizer"),
    ({"bad": {"again": False}, "exact": True}, "hardware"),
    ({"bad": {"again": False}, "far": True}, "hardware"),
    ({"bad": {"again": False}}, "unknown"),
    ({"bad": {"again": True, "other batch": False, "float32": False}}, "precision"),
    ({"bad": {"again": True, "other batch": False, "float32": True}}, "data"),
    ({"bad": {"again": True, "other batch": True}}, "optimizer"),
    ({"bad": {"again": True}}, "unknown"),
  ],
)
def test_the_cause_follows_from_the_evidence(seen, cause):
  plain = {"bad": {"again": True}, "far": False, "exact": False}
  assert examine.Evidence(**{**plain, **seen}).cause() == cause


# What is done.


def nan_in_step_11():
  e = faulty.nan_in_step_11()
  e.faults.examine = 0
  return e


def rolling():
  e = nan_in_step_11()
  e.faults.policy = "roll_back"
  return e


def test_skip_is_a_run_in_which_that_update_did_not_happen(tmp_path):
  path = trained(nan_in_step_11(), tmp_path)
  examples = [BATCH * i if i != 10 else None for i in range(16)]
  close(losses(path), by_hand(faulty.base(), examples))
  assert [event["step"] for event in runs.events(path, "skip")] == [11]
  assert kept(path)[0]["cause"] == "unknown"


def test_lower_rate_halves_the_updates_behind_a_fault(tmp_path):
  e = nan_in_step_11()
  e.faults.policy = "lower_rate"
  path = trained(e, tmp_path)
  examples = [BATCH * i if i != 10 else None for i in range(16)]
  close(losses(path), by_hand(faulty.base(), examples, lowered_from=11))


ROLLED = [BATCH * i for i in [*range(8), *range(11, 19)]]  # Step 11 was bad, and 8 was saved.


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
  return trained(rolling(), tmp_path_factory.mktemp("rolled") / "run")


def test_roll_back_is_a_run_that_was_given_the_later_data(rolled):
  close(losses(rolled), by_hand(faulty.base(), ROLLED))
  (event,) = runs.events(rolled, "rollback")
  assert (event["step"], event["to"], event["example"]) == (11, 8, 88)
  assert runs.saved(rolled) == [12, 16]


@pytest.mark.parametrize("before", [8, 9])
def test_a_crash_behind_a_rollback_changes_nothing(tmp_path, rolled, before):
  class Crash(Part):
    def before_step(self, step):
      if step == before and runs.events(tmp_path, "rollback"):
        raise RuntimeError("planted")

  with pytest.raises(RuntimeError, match="planted"):
    trained(rolling(), tmp_path, parts=[Crash()])
  assert runs.saved(tmp_path)[-1] == 8
  trained(rolling(), tmp_path)
  assert runs.values(tmp_path) == runs.values(rolled)
  assert len(runs.events(tmp_path, "rollback")) == 1


@pytest.mark.parametrize("before", [10, 11])
def test_a_signal_at_the_fault_changes_nothing(tmp_path, rolled, before):
  leave = Plant(before, lambda run: signal.raise_signal(signal.SIGTERM))
  assert train(rolling(), tmp_path, quiet=True, parts=[leave]).left
  trained(rolling(), tmp_path)
  assert runs.values(tmp_path) == runs.values(rolled)


def test_stop_ends_the_run_and_does_so_again(tmp_path):
  e = nan_in_step_11()
  e.faults.policy = "stop"
  for _ in range(2):
    with pytest.raises(CheckFailed, match=r"step 11: the loss \(nan\).*as faults.policy says"):
      trained(e, tmp_path)
    assert runs.saved(tmp_path) == [4, 8]


def test_so_many_faults_in_a_row_end_the_run(tmp_path):
  e = faulty.base()
  e.data.at, e.faults.patience = tuple(range(80, 200)), 3
  with pytest.raises(CheckFailed, match=r"step 13: .* it is the 3th step in a row"):
    trained(e, tmp_path)
  assert [event["step"] for event in runs.events(tmp_path, "incident")] == [11, 12, 13]


def test_so_many_spikes_in_a_row_are_the_new_normal(tmp_path):
  e = faulty.base()
  e.data.at, e.data.how, e.data.to = tuple(range(80, 200)), "scale", -60.0
  e.faults, e.optimizer.lr = Faults(spike=12.0, window=8, patience=3), 1e-3
  path = trained(e, tmp_path)
  skipped = [row["step"] for row in runs.read(path, "metrics.jsonl") if row["skipped"]]
  assert skipped == [11, 12, 13]


def test_rolling_back_that_does_not_help_ends_the_run(tmp_path):
  e = rolling()
  e.data.at, e.faults.patience = tuple(range(80, 400)), 2
  with pytest.raises(CheckFailed, match=r"rolling back to step \d did not help 2 times"):
    trained(e, tmp_path)


@pytest.mark.parametrize(("fault", "to", "saved"), [(8, 4, [12, 16]), (16, 12, [12, 16])])
def test_a_fault_in_a_step_to_be_saved_is_not_saved(tmp_path, fault, to, saved):
  e = faulty.base()
  e.data.at, e.faults.policy = ((fault - 1) * BATCH + 1,), "roll_back"
  path = trained(e, tmp_path)
  assert [event["to"] for event in runs.events(path, "rollback")] == [to]
  assert runs.saved(path) == saved and [e["step"] for e in runs.events(path, "incident")] == [fault]
  at = [*range(to), *range(fault, fault + 16 - to)]
  close(losses(path), by_hand(faulty.base(), [BATCH * i for i in at]))


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"spike": 0.0}, r"faults.spike is 0.0; give standard deviations above 0"),
    ({"factor": 1.0}, r"faults.factor is 1.0; give a number between 0 and 1"),
    ({"window": 1}, r"faults.window is 1; give 2 or more"),
    ({"patience": 0}, r"faults.patience is 0; give 1 or more"),
  ],
)
def test_settings_that_make_no_sense_are_refused(fields, said):
  with pytest.raises(Refused, match=said):
    Faults(**fields).check()


def test_a_checkpoint_that_was_bad_already_is_not_gone_back_to(tmp_path):
  class Spoil(Part):
    """Behind the parts that save: what they save is asked of the run."""

    def on_away(self, phase):
      if phase == "save" and int(self.run.state.step) == 8 and not hasattr(self, "done"):
        self.done = True
        plant_nan(self.run)

  e = faulty.base()
  e.faults = Faults(policy="roll_back")
  path = trained(e, tmp_path, parts=[Spoil()])
  assert [event["cause"] for event in runs.events(path, "incident")] == ["optimizer"] * 2
  assert [event["to"] for event in runs.events(path, "rollback")] == [8, 4]
  close(losses(path), by_hand(e, [BATCH * i for i in [*range(4), *range(10, 22)]]))


def test_who_wants_to_go_back_further_than_what_is_kept_goes_to_the_oldest(tmp_path):
  e = rolling()
  e.checkpoints, e.faults.back = Checkpoints(every=2, keep=2), 9
  path = trained(e, tmp_path)
  (event,) = runs.events(path, "rollback")
  assert event["to"] in (6, 8) and losses(path)[-1] is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nan_in_step_11", "rolled_back"])
def test_two_processes_do_the_same(tmp_path, name):
  alone = trained(getattr(faulty, name)(), tmp_path / "alone")
  target = f"tests/faulty.py:{name}"
  both = [
    runs.start(tmp_path / "both", file=target, **environment) for environment in runs.joined(2)
  ]
  for process in both:
    code, err = runs.finish(process)
    assert code == Exit.DONE, err
  close(losses(tmp_path / "both"), losses(alone))
  for event in ("incident", "skip", "rollback"):
    plain = lambda path, event=event: [
      {k: v for k, v in found.items() if k != "time"} for found in runs.events(path, event)
    ]
    assert plain(tmp_path / "both") == plain(alone)
  about, _ = kept(tmp_path / "both")
  assert about["cause"] == "data" and about["rows"] == kept(alone)[0]["rows"]
