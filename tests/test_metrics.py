"""FLOPs by hand, speed by a clock that the test sets, and rows of a real run."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import metrics
from bigtrain.evaluate import Evaluating
from bigtrain.experiment import Evaluation, Logging
from bigtrain.mesh import Mesh
from bigtrain.metrics import Recorder, peak_flops
from bigtrain.models import presets
from bigtrain.models.count import count_parameters
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.parts import Part
from bigtrain.run import Run
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train
from tests import packed

SPEED = {
  "step_seconds",
  "input_wait_seconds",
  "tokens_per_second",
  "model_flops_per_second",
  "mfu",
}


def test_flops_of_a_small_model_equal_a_count_by_hand():
  model = packed.experiment().model
  # A token meets, in each of 2 layers: q and o (32 x 96), k and v (32 x 48), 3 x (32 x 112); then
  # the table (80 x 32). Six operations each. Attention: in 2 layers, 16 heads of 6, forward 2 + 2
  # operations an element and seen position, backward twice that; on average half of a row is seen.
  weights = 2 * (2 * 32 * 96 + 2 * 32 * 48 + 3 * 32 * 112) + 80 * 32
  assert weights == 42_496
  for length in (1, 8, 1000):
    attention = 2 * 16 * 6 * 12 * length / 2
    assert model.flops(length) == length * (6 * weights + attention)


@pytest.mark.parametrize(("causal", "window", "seen"), [(True, 4, 4), (False, None, 64)])
def test_attention_counts_what_a_query_sees(causal, window, seen):
  half, other = (
    packed.experiment(),
    packed.experiment(attention={"causal": causal, "window": window}),
  )
  assert other.model.flops(64) - half.model.flops(64) == 64 * 2 * 16 * 6 * 12 * (seen - 32)


def test_gpt2_costs_six_operations_a_parameter_and_token():
  model = presets.gpt2("124m")
  assert count_parameters(model) == 124_439_808
  positions = 1024 * 768  # Only added: no products.
  assert model.flops(1) == pytest.approx(6 * (124_439_808 - positions), rel=2e-3)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [("TPU v5 lite", 197e12), ("TPU v5p", None), ("TPU v5", 459e12), ("cpu", None)],
)
def test_the_peak_is_that_of_the_chip_times_their_number(monkeypatch, kind, peak):
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)] * 4)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  peak = 459e12 if kind == "TPU v5p" else peak  # Its devices call themselves either.
  assert peak_flops() == (peak and 4 * peak)


class Device:
  """A device on which a step takes a second, by a clock that only it moves."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)

  def step(self) -> "Scalar":
    self.last = Scalar(self)
    return self.last


class Scalar:
  """A metric that is ready once someone has waited for it."""

  def __init__(self, device: Device):
    self.device, self.ready = device, False

  def block_until_ready(self):
    self.device.now += 0 if self.ready else 1
    self.ready = True
    return self

  def __float__(self) -> float:
    assert self.ready
    return 2.5


@pytest.fixture
def recorded(monkeypatch, tmp_path):
  """A run of 6 steps with a row every 2, its recorder, and its device."""
  monkeypatch.setattr(metrics, "peak_flops", lambda: 1e6)
  device = Device(monkeypatch)
  e = packed.experiment(steps=6, logging=Logging(every=2), evaluation=Evaluation(every=3))
  run = Run(e, RunDirectory(tmp_path), None)
  run.feed = types.SimpleNamespace(wait=0.25, shape=(packed.B, packed.T), lengths=(packed.T,))
  recorder = Recorder()
  run.parts = [recorder]
  recorder.start(run, 0)
  yield run, recorder, device
  run.directory.close()


def steps_recorded(run) -> list[int]:
  path = run.directory.path / "metrics.jsonl"
  return [row["step"] for row in run.directory.rows("train")] if path.exists() else []


def test_metrics_are_fetched_when_the_next_step_was_dispatched(recorded):
  run, recorder, device = recorded
  scalars = []
  for step in range(1, 7):
    scalars.append(device.step())
    recorder.after_step(step, {"loss": scalars[-1]})
    last = step == 6
    assert [s.ready for s in scalars] == [True] * (step - 1) + [last]
    assert steps_recorded(run) == [s for s in (2, 4, 6) if s < step or last]


def test_a_save_waits_for_the_row_of_its_step(recorded):
  run, recorder, device = recorded
  for step in (1, 2):
    recorder.after_step(step, {"loss": device.step()})
  recorder.on_away("save")
  assert steps_recorded(run) == [2]
  recorder.after_step(3, {"loss": device.step()})
  assert steps_recorded(run) == [2]


def test_speed_is_that_of_training_alone(recorded):
  run, recorder, device = recorded
  evaluating = Evaluating()
  evaluating.start(run, 0)
  run.started = True

  def evaluate():
    device.last.block_until_ready()  # A device does one thing after another.
    device.now += 7
    return {"loss": 1.0}

  evaluating.evaluator = types.SimpleNamespace(metrics=evaluate)
  for step in range(1, 7):
    values = {"loss": device.step()}
    run.leaves = [values["loss"]]  # Ready when the step is.
    recorder.after_step(step, values)
    evaluating.after_step(step, values)
  assert device.now == 6 + 2 * 7
  flops = packed.B * run.experiment.model.flops(packed.T)
  for row in run.directory.rows("train"):
    assert row["loss"] == 2.5
    assert row["step_seconds"] == pytest.approx(1)
    assert row["tokens_per_second"] == pytest.approx(packed.B * packed.T)
    assert row["model_flops_per_second"] == pytest.approx(flops)
    assert row["mfu"] == pytest.approx(flops / 1e6)
    assert row["input_wait_seconds"] == pytest.approx(0.25)
  assert [row["step"] for row in run.directory.rows("eval")] == [3, 6]


def test_the_first_step_of_a_start_is_recorded_without_a_speed(recorded):
  run, recorder, device = recorded
  run.experiment.logging.every = 1
  device.now = 50.0  # It warms up.
  for step in range(1, 7):
    recorder.after_step(step, {"loss": device.step()})
  first, *others = run.directory.rows("train")
  assert first["loss"] == 2.5 and not SPEED & first.keys()
  assert [row["step_seconds"] for row in others] == [1] * 5


def test_the_time_that_rows_take_counts_though_devices_compute_meanwhile(recorded, monkeypatch):
  run, recorder, device = recorded
  run.experiment.logging.every = 1
  record = run.record

  def slow(*row):
    record(*row)
    device.now += 3
    device.last.ready = True  # The step that was dispatched before the row was written.

  monkeypatch.setattr(run, "record", slow)
  for step in range(1, 7):
    recorder.after_step(step, {"loss": device.step()})
  rows = run.directory.rows("train")[1:]
  assert [row["step_seconds"] for row in rows] == [3] * 5
  assert [row["tokens_per_second"] for row in rows] == [packed.B * packed.T / 3] * 5


def test_data_without_tokens_and_a_model_without_a_formula_show_what_is_known(
  recorded, monkeypatch
):
  run, recorder, device = recorded
  monkeypatch.setattr(packed.Packed, "row_length", lambda self: None)
  monkeypatch.setattr(LanguageModelConfig, "flops", lambda self, length=1: None)
  recorder.start(run, 0)
  for step in range(1, 7):
    recorder.after_step(step, {"loss": device.step()})
  for row in run.directory.rows("train"):
    assert row["examples_per_second"] == packed.B
    assert SPEED & row.keys() == {"step_seconds", "input_wait_seconds"}


class Watching(Part):
  """Notes the rows that are written when each step has been dispatched."""

  def start(self, run, step):
    super().start(run, step)
    self.rows = {}

  def after_step(self, step, metrics):
    self.rows[step] = steps_recorded(self.run)


def test_a_run_writes_every_row_once_in_order_and_one_step_late(tmp_path):
  e = packed.experiment(
    optimizer=SGD(lr=0.1, schedule=Constant()),
    mesh=Mesh(data=8, fsdp=1),
    model={"layers": 1},
    steps=5,
  )
  e.logging, e.evaluation = Logging(every=2, tensorboard=False), Evaluation(every=4, batch=8)
  watching = Watching()
  train(e, tmp_path / "run", quiet=True, parts=[watching])
  # Step 2 is recorded when step 3 has been dispatched; the last one and one to evaluate at once.
  assert watching.rows == {1: [], 2: [], 3: [2], 4: [2, 4], 5: [2, 4, 5]}
  lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  rows = [(row["kind"], row["step"]) for row in lines]
  assert rows == [("train", 2), ("train", 4), ("eval", 4), ("train", 5), ("eval", 5)]


def test_a_mean_of_nothing_is_left_out_unless_it_shows_a_fault(recorded):
  run, recorder, device = recorded
  run.experiment.logging.every = 1
  found = {"loss": 0.0, "loss/a": 0.0, "loss/b": np.nan, "weight": 0.0}
  weights = {"loss": 0.0, "loss/a": 0.0, "loss/b": 0.0}
  recorder.after_step(1, jax.tree.map(jnp.float32, found | {"weights": weights}))
  device.now += 1
  found = {"loss": 2.0, "loss/a": 0.0, "loss/b": 2.0, "weight": 3.0}
  weights = {"loss": 3.0, "loss/a": 0.0, "loss/b": 3.0}
  recorder.after_step(2, jax.tree.map(jnp.float32, found | {"weights": weights}))
  device.now += 1
  recorder.on_away("save")
  empty, row = run.directory.rows("train")
  assert "loss" not in empty and "loss/a" not in empty and empty["loss/b"] is None
  assert (row["loss"], row["loss/b"]) == (2, 2) and "loss/a" not in row
