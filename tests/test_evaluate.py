"""Held-out metrics against float64 sums over the model's logits, every example once."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.text import TextData
from bigtrain.evaluate import Evaluator
from bigtrain.experiment import Evaluation, ObjectiveConfig
from bigtrain.mesh import Mesh
from bigtrain.models.position import Learned
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.average import averaged
from bigtrain.program import Program
from bigtrain.run import Run
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train
from tests import packed

EXAMPLES = 13


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run with moved weights, and an average of them that was moved otherwise."""
  e = packed.experiment(optimizer=AdamW(lr=1e-2, average=0.9), mesh=Mesh(data=2, fsdp=2, tensor=2))
  run = Run(e, RunDirectory(tmp_path_factory.mktemp("run"), writes=False), None)
  state = packed.start(e)
  *rest, average = state.optimizer
  moved = jax.tree.map(lambda w: w * 1.5, state.model)
  moved = dataclasses.replace(state, optimizer=(*rest, average._replace(weights=moved)))
  run.state = jax.device_put(moved)
  return run


def by_hand(model, data) -> dict[str, float]:
  b = data.eval_batch(0, EXAMPLES)
  logits = np.asarray(jax.jit(model)(b["tokens"], b["positions"], b["segments"]), np.float64)
  logsumexp = np.log(np.exp(logits).sum(-1))
  target = np.take_along_axis(logits, b["targets"][..., None], -1)[..., 0]
  nll = ((logsumexp - target) * b["weights"]).sum()
  tokens = b["weights"].sum(dtype=np.float64)
  return {
    "loss": nll / tokens,
    "accuracy": ((logits.argmax(-1) == b["targets"]) * b["weights"]).sum() / tokens,
    "bits_per_byte": nll / math.log(2) / b["bytes"].sum(dtype=np.float64),
    "nats_per_byte": nll / b["bytes"].sum(dtype=np.float64),
    "perplexity": math.exp(nll / tokens),
  }


@pytest.fixture(scope="module")
def wanted(run):
  return by_hand(averaged(run.state.optimizer, run.state.model), run.data)


@pytest.mark.parametrize("size", [5, 8, EXAMPLES, 32])
def test_every_held_out_example_counts_once_whatever_the_batch(run, wanted, size):
  run.experiment.evaluation.batch = size
  assert Evaluator(run).metrics() == pytest.approx(wanted, rel=1e-5)


def test_a_batch_is_dispatched_when_the_one_before_it_is_done(run, monkeypatch):
  """Hundreds on their way at once deadlocked eight virtual devices until XLA aborted."""
  running = []

  class Sums:
    def block_until_ready(self):
      running.remove(self)

    def __array__(self, *_, **__):
      return np.ones(2)

  def add(*_):
    assert not running
    running.append(Sums())
    return {"loss": running[0]}, np.float32(1)

  run.experiment.evaluation.batch = 5
  evaluator = Evaluator(run)
  monkeypatch.setattr(evaluator, "_add", add)
  assert evaluator.metrics()["loss"] == 1


def test_averaged_weights_are_those_evaluated(run, wanted):
  raw = by_hand(run.state.model, run.data)
  assert abs(raw["loss"] - wanted["loss"]) > 0.01
  run.experiment.evaluation.batch = 8
  assert run.evaluate() == pytest.approx(wanted, rel=1e-5)


def test_a_mesh_evaluates_to_the_same(run, wanted, tmp_path):
  e = dataclasses.replace(run.experiment, evaluation=dataclasses.replace(run.experiment.evaluation))
  e.evaluation.batch = 8
  spread = Run(e, RunDirectory(tmp_path, writes=False), mesh := e.mesh.make())
  with jax.set_mesh(mesh):
    place = jax.tree.map(lambda x: x.sharding, Program(e, mesh).abstract())
    spread.state = jax.device_put(run.state, place)
  assert spread.evaluate() == pytest.approx(wanted, rel=1e-5)


def test_a_split_without_examples_is_refused_and_trains_without_evaluations(run, tmp_path):
  empty = Run(dataclasses.replace(run.experiment, data=packed.Packed(examples=0)), None, None)
  empty.state = run.state
  with pytest.raises(Refused, match="nothing out to evaluate on; set the source's `validation`"):
    Evaluator(empty).metrics()
  e = packed.experiment(data=packed.Packed(examples=0), model={"layers": 1}, steps=2)
  assert not len(train(e, tmp_path / "run", quiet=True).evaluations)


def test_what_an_objective_does_not_derive_is_not_shown(run, wanted, monkeypatch):
  monkeypatch.setattr(CausalLM, "derived", ObjectiveConfig.derived)
  run.experiment.evaluation.batch = 8
  assert Evaluator(run).metrics().keys() == wanted.keys() - {"perplexity"}


@pytest.mark.parametrize(("prompt", "tokens"), [("It was", 3), ("It", 5)])
def test_prompts_that_do_not_fit_are_refused_before_the_first_step(tmp_path, prompt, tokens):
  e = packed.experiment(data=TextData(seq=4), model={"vocab": 384, "position": Learned(length=6)})
  e.evaluation = Evaluation(batch=8, prompts=(prompt,), sample_tokens=tokens)
  with pytest.raises(Refused, match="do not fit into the model's 6 positions"):
    train(e, tmp_path / "run", quiet=True)
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_nothing_held_out_counts_for_is_left_out(run, monkeypatch):
  """A source of which no row is held out, and a split without a token that counts."""
  run.experiment.evaluation.batch = 8
  batch_of = run.data.eval_batch

  def rows(weights, *args):
    batch = batch_of(*args)
    source = np.zeros(len(batch["tokens"]), np.float32)
    return batch | {"weights": batch["weights"] * weights, "source/a": source}

  monkeypatch.setattr(run.data, "eval_batch", functools.partial(rows, 1))
  found = Evaluator(run).metrics()
  assert "loss/a" not in found and found["perplexity"] == pytest.approx(math.exp(found["loss"]))
  monkeypatch.setattr(run.data, "eval_batch", functools.partial(rows, 0))
  assert Evaluator(run).metrics() == {}
