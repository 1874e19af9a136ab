"""Each check finds what it is for, names it, and is silent on a healthy record.

Synthetic records stand just beyond a check's threshold and just before it; the golden file holds
the records of real runs, sick and healthy.
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from bigtrain import cli, diagnose, load
from bigtrain.columns import Columns, columns
from bigtrain.diagnose import Records
from bigtrain.diagnose.records import course
from bigtrain.failures import CheckFailed
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train
from tests import faulty

ROOT = Path(__file__).parent.parent

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


def both(name: str, value) -> dict[str, np.ndarray]:
  return layered(name, "attention", value) | layered(name, "feed_forward", value)


def sized(name: str, value) -> dict:
  return {"layers": both(name, value)}


def risen(share: float) -> dict:
  """A loss that falls from 5 to 2, and ends so much of that higher."""
  return {"loss": np.where(STEPS <= 600, falling(noise=0.001), 2.15 + 3 * share)}


def spiked(score: float, at=(44, 64, 84)) -> dict:
  """A loss around 2 whose noise is 5%, with some rows this many standard deviations above it."""
  deviation = 0.05 * np.arange(-2, 3) / 1.4826  # The median of magnitudes is 0.05 / 1.4826.
  loss = 2.0 * np.exp(np.tile(deviation, 20))
  loss[:3] = 5.0  # It has learned.
  loss[list(at)] = 2.0 * np.exp(0.05 * score)
  return {"loss": loss}


def dead(share: float) -> dict:
  return {"layers": layered("dead", "feed_forward", lambda i: share if i == 3 else 0.0)}


def collapsed(score: float, entropy: float = 0.04) -> dict:
  scores = layered("score_max", "attention", lambda i: score)
  return {"layers": scores | layered("entropy", "attention", lambda i: entropy)}


def stuck(moved: float) -> dict:
  """A loss that stays, and updates of which all could move the weights by that share."""
  loss = 5.0 + 0.02 * np.random.default_rng(1).normal(size=len(STEPS))
  return {"loss": loss} | sized("update", lambda i: 0.05 * moved / STEPS[-1])


def compiled(seconds: float, last: str = "end") -> dict:
  start = {"event": "start", "time": 0.0}
  compiling = {"event": "compile", "time": seconds, "seconds": seconds}
  return {"events": [start, compiling, {"event": last, "time": 2 * 61.0}]}


ones = lambda value: np.full(len(STEPS), value)
# By kind of finding: just beyond the threshold, and just before it.
NEAR = {
  "divergence": ({"loss": np.where(STEPS > 500, np.nan, falling())}, {}),
  "vanishing gradients": (
    sized("gradient", lambda i: 0.9e-3 if i < 4 else 1.0),
    sized("gradient", lambda i: 1.1e-3 if i < 4 else 1.0),
  ),
  "exploding gradients": (
    sized("output", lambda i: 1.0 if i < 4 else 1.1e3),
    sized("output", lambda i: 1.0 if i < 4 else 0.9e3),
  ),
  "dead units": (dead(0.51), dead(0.49)),
  "saturated units": (
    {"layers": layered("saturated", "feed_forward", lambda i: 0.51)},
    {"layers": layered("saturated", "feed_forward", lambda i: 0.49)},
  ),
  "attention collapse": (collapsed(101.0), collapsed(99.0)),
  "learning rate too high": (risen(0.11), risen(0.04)),
  "learning rate too low": (stuck(0.009), stuck(0.011)),
  "loss spikes": (spiked(8.5), spiked(7.5)),
  "over-fitting": (
    {"eval_loss": [3.0, 2.5, 2.4, 2.2, 2.34]},
    {"eval_loss": [3.0, 2.5, 2.4, 2.2, 2.29]},
  ),
  "input-bound": ({"input_wait_seconds": ones(0.021)}, {"input_wait_seconds": ones(0.019)}),
  "compile-bound": (compiled(61.5), compiled(60.5)),
  "chip not filled": ({"mfu": ones(0.09)}, {"mfu": ones(0.11)}),
}


def kinds(**fields) -> list[str]:
  return [finding.kind for finding in diagnose.diagnose(records(**fields))]


@pytest.mark.parametrize("kind", NEAR)
def test_a_check_tells_its_sickness_and_no_other_beyond_its_threshold_only(kind):
  beyond, before = NEAR[kind]
  (finding,) = diagnose.diagnose(records(**beyond))
  assert finding.kind == kind and finding.evidence and finding.remedy
  assert kinds(**before) == []


def test_every_check_is_found_where_it_stands():
  names = {check.__name__ for check in diagnose.checks()}
  assert len(names) == len(NEAR) + 4  # Of events alone: further down.
  assert {
    "faults",
    "failed",
    "hangs",
    "bad_machines",
    "vanishing_gradients",
    "loss_spikes",
    "input_bound",
  } <= names


def test_a_healthy_record_is_told_nothing():
  assert kinds() == []
  assert kinds(mfu=ones(0.4)) == []


def test_what_follows_from_another_finding_is_not_told():
  vanishing = sized("gradient", lambda i: 1e-9 if i < 4 else 1.0)["layers"]
  assert kinds(**stuck(0.001) | {"layers": stuck(0.001)["layers"] | vanishing}) == [
    "vanishing gradients"
  ]
  layers = vanishing | layered("dead", "feed_forward", lambda i: 1.0 if i == 3 else 0.0)
  assert kinds(layers=layers) == ["dead units"]
  assert kinds(input_wait_seconds=ones(0.06), mfu=ones(0.03)) == ["input-bound"]


def test_troubles_come_before_advice():
  found = diagnose.diagnose(records(mfu=ones(0.03), eval_loss=[3.0, 2.5, 2.8, 3.4]))
  assert [f.severity for f in found] == ["trouble", "advice"]


def test_a_doubled_loss_near_zero_is_neither_a_rise_nor_a_spike():
  loss = np.maximum(2.3 * np.exp(-STEPS / 50), 1e-3) * np.exp(0.3 * RNG.normal(size=len(STEPS)))
  loss[[50, 70, 90]] *= 20
  loss[-10:] *= 3
  assert kinds(loss=loss) == []


def test_a_spike_between_two_rows_is_seen_and_named_by_the_row_behind_it():
  loss = falling()
  highest = loss + 0.01
  highest[[40, 60, 80]] += 3
  (finding,) = diagnose.diagnose(records(loss=loss, loss_max=highest))
  assert finding.kind == "loss spikes" and "410, 610, 810" in finding.evidence
  assert finding.severity == "trouble"
  (once,) = diagnose.diagnose(records(**spiked(20.0, at=(54,))))
  assert once.severity == "advice"


def test_a_rise_at_the_beginning_is_told_although_the_loss_falls_again():
  (finding,) = diagnose.diagnose(
    records(loss=np.where((STEPS > 20) & (STEPS < 200), 15, falling()))
  )
  assert finding.kind == "learning rate too high" and "before it fell" in finding.evidence


def test_sparse_units_of_a_small_batch_are_not_dead():
  assert kinds(**dead(0.7), weight=ones(1024.0)) == ["dead units"]
  assert kinds(**dead(0.7), weight=ones(32.0)) == []


def test_a_held_out_loss_that_rises_with_the_training_loss_is_no_over_fitting():
  loss = np.where(STEPS <= 500, falling(noise=0.001), 2.5)
  assert "over-fitting" not in kinds(loss=loss, eval_loss=[2.6, 2.2, 2.4, 2.5])


def test_a_run_that_goes_on_is_not_told_what_its_compilation_cost():
  assert kinds(**compiled(100.0)) == ["compile-bound"]
  assert kinds(**compiled(100.0, last="save")) == []


def test_the_evidence_names_the_ends_of_the_stack_and_where_the_gradient_is_lost():
  (finding,) = diagnose.diagnose(records(**sized("gradient", lambda i: 1e-9 * 10**i)))
  assert finding.evidence.startswith("from transformer.07 to transformer.00, the gradient goes")
  assert "from transformer.03 on" in finding.evidence


GOLDEN = ROOT / "tests" / "golden" / "diagnosed.json.gz"  # By tools/benchmarks/diagnose.py.
RUNS = json.loads(gzip.decompress(GOLDEN.read_bytes()))
# Where it is wrong: docs/diagnose.md says why.
MISSED = {
  "first: decoder with large query and key weights",
  "first: decoder on one short row",
  "second: ViT at 100 times its rate",
}
BESIDES = {"first: mlp:fashion": {"over-fitting"}}  # It does over-fit.


@pytest.mark.parametrize("name", RUNS)
def test_real_runs_are_told_what_they_are_sick_of_and_healthy_ones_nothing(name):
  run = RUNS[name]
  of = lambda kind: columns([row for row in run["rows"] if row["kind"] == kind])
  found = diagnose.diagnose(Records(of("train"), of("eval"), of("layers"), run["events"]))
  troubles = {finding.kind for finding in found if finding.severity == "trouble"}
  assert troubles <= {run["expected"], *run["also"], *BESIDES.get(name, ())}
  told = run["expected"] in {None, *(finding.kind for finding in found)}
  assert told == (name not in MISSED)


def test_thirty_layers_of_sigmoids_vanish_and_the_layers_are_named(tmp_path, capsys):
  e, _ = load.load(str(ROOT / "experiments" / "vanishing_gradients.py"))
  e.steps, e.epochs, e.batch, e.evaluation.every = 20, None, 32, 0
  e.logging.every, e.logging.layers_every, e.logging.tensorboard = 1, 10, False
  run = train(e, tmp_path, quiet=True)
  assert 1e-30 < run.layers["gradient/layers.0"][0] < 1e-15  # Not lost in float32.
  assert cli.main(["diagnose", str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert out.startswith("vanishing gradients: from layers.30 to layers.0, the gradient goes from")


def recorded(folder) -> RunDirectory:
  """A run that waits for its input, without statistics of layers, still going on."""
  directory = RunDirectory(folder, writes=True)
  directory.event("start")
  for step, loss in zip(STEPS.tolist(), falling(), strict=True):
    values = {"loss": float(loss), "step_seconds": 0.1, "input_wait_seconds": 0.05}
    directory.row(step, "train", values)
  return directory


def test_the_command_reads_a_run_directory_and_says_what_it_found(tmp_path, capsys):
  directory = recorded(tmp_path)
  (tmp_path / "metrics.jsonl").open("a").write('{"step": 1010, "ki')  # It is being written.
  assert cli.main(["diagnose", str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert out.startswith("input-bound: steps wait for their batch 50% of the time. Decode")
  assert "layers were not looked at" in out
  directory.close()


def test_the_command_prints_json_for_programs(tmp_path, capsys):
  recorded(tmp_path).close()
  assert cli.main(["diagnose", str(tmp_path), "--json"]) == 0
  (finding,) = json.loads(capsys.readouterr().out)
  assert finding["severity"] == "advice" and finding["kind"] == "input-bound"
  assert finding["evidence"] and finding["remedy"]


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
  directory = RunDirectory(tmp_path / "began", writes=True)
  directory.path.mkdir()
  directory.event("start")
  directory.close()
  for name, said in (
    ("nowhere", "there is no directory"),
    ("", "nothing was trained there"),
    ("began", "has not logged a step yet"),
  ):
    assert cli.main(["diagnose", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_a_step_of_padding_alone_is_no_divergence(tmp_path):
  rows = [{"step": s, "kind": "train", "loss": 2.0, "weight": 8.0} for s in range(1, 41)]
  rows[7] = {"step": 8, "kind": "train", "weight": 0.0}
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  read = diagnose.read(tmp_path)
  assert len(read.train["loss"]) == 39 and read.losses() is not None
  assert "divergence" not in [finding.kind for finding in diagnose.diagnose(read)]


def test_the_course_of_a_long_run_is_found_quickly_and_is_that_of_all_its_rows():
  noise = np.random.default_rng(0).normal(0, 0.05, 20_000)
  loss = 2 + 8 / np.arange(1, 20_001) ** 0.4 + noise
  loss[9_000:13_000] += 1  # It rises for a while.
  windows = np.lib.stride_tricks.sliding_window_view(loss, 2_000)[::7]
  every = np.median(windows, axis=1)
  found = course(loss)
  assert found.highest == pytest.approx(every.max(), abs=0.01)
  assert found.best == pytest.approx(every.min(), abs=0.01)
  assert (found.start, found.end) == (np.median(loss[:2_000]), np.median(loss[-2_000:]))
  # Medians around each of a million rows would take hours.
  assert course(np.tile(loss, 50)).noise == pytest.approx(found.noise, rel=0.01)


INCIDENT = {"event": "incident", "step": 40, "cause": "data", "first_bad": "batch/inputs"}
PATH = {"path": "incidents/00000040"}
FAILED = {"event": "error", "error": "CheckFailed: x", "time": 1}


@pytest.mark.parametrize(
  ("events", "kind", "said", "severity"),
  [
    ([INCIDENT | PATH], "updates not applied", r"step 40 is data.*inputs \(incidents/0", "advice"),
    (
      [INCIDENT | {"step": s, "cause": "unknown" if s < 30 else "data"} for s in range(20, 40)],
      "updates not applied",
      r"20, the last at 39; the cause of step 30 is data",
      "trouble",
    ),
    ([INCIDENT, INCIDENT], "updates not applied", r"that of step 40;", "advice"),
    (
      [{"event": "start", "time": 0}, FAILED],
      "failed",
      "Failed: x",
      "",
    ),
    ([{"event": "hang", "phase": "save"}] * 3, "hangs", "3 times a deadline passed: 3 in save", ""),
    ([{"event": "bad_device", "step": 4, "found": "device 3"}], "bad device", "device 3", ""),
    ([{"event": "damaged", "step": 8, "why": "w"}], "damaged checkpoints", "of step 8: w", ""),
    ([{"event": "straggler", "process": 2}] * 3, "slow host", "process 2 was 3 times", "advice"),
  ],
)
def test_what_went_wrong_outside_of_learning_is_told(events, kind, said, severity):
  (finding,) = diagnose.diagnose(records(events=events))
  assert finding.kind == kind and re.search(said, finding.evidence)
  assert finding.severity == (severity or "trouble")


def test_what_is_over_is_not_told():
  failed, again = (
    {"event": "error", "error": "x"},
    [{"event": "start"}, {"event": "end", "time": 1}],
  )
  slow = [{"event": "straggler", "process": p} for p in range(3)]
  events = [{"event": "start", "time": 0}, failed, *again, *slow]
  assert diagnose.diagnose(records(events=events)) == []


def test_a_run_whose_loss_was_never_a_number_is_not_well(tmp_path, capsys):
  e = faulty.base()
  e.data.at, e.faults.patience = tuple(range(0, 200)), 3
  with pytest.raises(CheckFailed):
    train(e, tmp_path / "run", quiet=True)
  assert cli.main(["diagnose", str(tmp_path / "run")]) == 0
  told = capsys.readouterr().out
  assert "updates not applied" in told and "failed" in told and "nothing is wrong" not in told
