"""Planted faults: every policy trains on as it promises."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.feed import put
from bigtrain.exit_codes import Exit
from bigtrain.experiment import Checkpoints
from bigtrain.failures import CheckFailed
from bigtrain.faults import Faults
from bigtrain.parts import Part
from bigtrain.program import Program
from bigtrain.sharding import batch_sharding
from bigtrain.train import train
from tests import faulty, runs
from tests.faulty import BATCH, Plant, kept, losses, plant_nan, trained


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
  assert kept(path)[0]["cause"] == "not examined"


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


def test_a_signal_while_it_rolls_back_is_heeded(tmp_path, rolled):
  class Leave(Part):
    def on_away(self, phase):
      if phase == "restore":
        signal.raise_signal(signal.SIGTERM)

  assert train(rolling(), tmp_path, quiet=True, parts=[Leave()]).left
  assert runs.events(tmp_path, "rollback") and runs.saved(tmp_path)[-1] < 12
  trained(rolling(), tmp_path)
  assert runs.values(tmp_path) == runs.values(rolled)


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
    with pytest.raises(CheckFailed, match=r"step 11: its update .*, as faults.policy says"):
      trained(e, tmp_path)
    assert runs.saved(tmp_path) == [4, 8]


def test_so_many_faults_in_a_row_end_the_run(tmp_path):
  e = faulty.base()
  e.data.at, e.faults.patience = tuple(range(80, 200)), 3
  with pytest.raises(CheckFailed, match=r"step 13: updates of 3 steps in a row"):
    trained(e, tmp_path)
  assert [event["step"] for event in runs.events(tmp_path, "incident")] == [11, 12, 13]


def test_faults_in_a_row_are_counted_over_restarts(tmp_path):
  class Leave(Part):
    def before_step(self, step):
      if step == 11:
        signal.raise_signal(signal.SIGTERM)

  e = faulty.base()
  e.data.at, e.faults.patience = tuple(range(80, 200)), 3
  assert train(e, tmp_path, quiet=True, parts=[Leave()]).left
  with pytest.raises(CheckFailed, match=r"step 13: updates of 3 steps in a row"):
    trained(e, tmp_path)


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
