"""Each check finds what it is for, names it, and is silent on a healthy record."""

import numpy as np
import pytest

from bigtrain import cli, diagnose
from bigtrain.columns import Columns
from bigtrain.diagnose import Records
from bigtrain.run_directory import RunDirectory

STEPS = np.arange(10, 1001, 10)
RNG = np.random.default_rng(0)


def falling(start=5.0, end=2.0, noise=0.02) -> np.ndarray:
  """A loss that falls as losses do."""
  return end + (start - end) * np.exp(-STEPS / 200) + noise * RNG.normal(size=len(STEPS))


def records(*, loss=None, layers=None, eval_loss=None, events=None, **train) -> Records:
  """A healthy run of eight layers, with some of it replaced."""
  n = len(STEPS)
  columns = {"step": STEPS, "loss": falling() if loss is None else loss}
  columns |= {"step_seconds": np.full(n, 0.1), "input_wait_seconds": np.full(n, 0.001)} | train
  of_layers = {"step": STEPS[9::10]}
  for i in range(8):
    at = f"transformer.{i:02}"
    sizes = {"gradient": 1e-3 * (1 + i / 8), "parameter": 0.05, "update": 5e-5}
    for name, value in sizes.items():
      of_layers[f"{name}/{at}.attention"] = np.full(10, value)
      of_layers[f"{name}/{at}.feed_forward"] = np.full(10, value)
    of_layers |= {f"dead/{at}.feed_forward": np.full(10, 0.1)}
    of_layers |= {f"score_max/{at}.attention": np.full(10, 12.0)}
    of_layers |= {f"entropy/{at}.attention": np.full(10, 2.0)}
  held_out = np.array([3.0, 2.5, 2.3, 2.2]) if eval_loss is None else np.array(eval_loss)
  evaluations = {"step": np.linspace(250, 1000, len(held_out)), "eval/validation/loss": held_out}
  default = [
    {"event": "start", "time": 0.0},
    {"event": "compile", "time": 9.0, "seconds": 8.0},
    {"event": "end", "time": 110.0},
  ]
  return Records(
    Columns(columns), Columns(evaluations), Columns(of_layers | (layers or {})), events or default
  )


def layered(name: str, part: str, value) -> dict[str, np.ndarray]:
  return {f"{name}/transformer.{i:02}.{part}": np.full(10, value(i)) for i in range(8)}


def gradients(value) -> dict[str, np.ndarray]:
  return layered("gradient", "attention", value) | layered("gradient", "feed_forward", value)


SICK = {
  "divergence": {"loss": np.where(STEPS > 500, np.nan, falling())},
  "vanishing gradients": {"layers": gradients(lambda i: 1e-9 * 10**i)},
  "exploding gradients": {"layers": gradients(lambda i: 1e3 / 10**i)},
  "dead units": {"layers": layered("dead", "feed_forward", lambda i: 0.9 if i == 3 else 0.0)},
  "saturated units": {"layers": layered("saturated", "feed_forward", lambda i: 0.8)},
  "attention collapse": {
    "layers": layered("score_max", "attention", lambda i: 300.0)
    | layered("entropy", "attention", lambda i: 0.01)
  },
  "learning rate too high": {"loss": np.where(STEPS < 500, falling(), 4.5 + 0 * STEPS)},
  "learning rate too low": {
    "loss": 5.0 + 0.02 * RNG.normal(size=len(STEPS)),
    "layers": {
      f"update/transformer.{i:02}.{part}": np.full(10, 1e-9)
      for i in range(8)
      for part in ("attention", "feed_forward")
    },
  },
  "over-fitting": {"eval_loss": [3.0, 2.5, 2.8, 3.4]},
  "input-bound": {"input_wait_seconds": np.full(len(STEPS), 0.06)},
  "compile-bound": {
    "events": [
      {"event": "start", "time": 0.0},
      {"event": "compile", "time": 90.0, "seconds": 85.0},
      {"event": "end", "time": 110.0},
    ]
  },
  "chip not filled": {"mfu": np.full(len(STEPS), 0.03)},
}


@pytest.mark.parametrize("kind", SICK)
def test_a_sick_record_is_told_its_sickness_and_no_other(kind):
  findings = diagnose.diagnose(records(**SICK[kind]))
  assert [finding.kind for finding in findings] == [kind]
  assert findings[0].evidence and findings[0].remedy


def test_a_healthy_record_is_told_nothing():
  assert diagnose.diagnose(records()) == []
  assert diagnose.diagnose(records(mfu=np.full(len(STEPS), 0.4))) == []


def test_spikes_are_counted_and_named_by_their_steps():
  loss = falling()
  loss[[40, 60, 80]] += 3
  (finding,) = diagnose.diagnose(records(loss=loss))
  assert finding.kind == "learning rate too high" and "410, 610, 810" in finding.evidence


def test_the_layers_of_the_evidence_are_the_ends_of_the_stack():
  (finding,) = diagnose.diagnose(records(layers=gradients(lambda i: 1e-9 * 10**i)))
  assert "transformer.00" in finding.evidence and "transformer.07" in finding.evidence


def test_the_command_reads_a_run_directory_and_says_what_it_found(tmp_path, capsys):
  directory = RunDirectory(tmp_path, writes=True)
  directory.event("start")
  for step, loss in zip(STEPS.tolist(), falling(), strict=True):
    values = {"loss": float(loss), "step_seconds": 0.1, "input_wait_seconds": 0.05}
    directory.row(step, "train", values)
  directory.close()
  assert cli.main(["diagnose", str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert out.startswith("input-bound: steps wait for their batch 50% of the time. Decode")


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
  assert cli.main(["diagnose", str(tmp_path)]) == 2
  assert "nothing was trained there" in capsys.readouterr().err
