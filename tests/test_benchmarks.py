"""The plain decoder, against which overhead is measured, computes what bigtrain computes."""

import dataclasses
import io
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

from bigtrain.load import load
from bigtrain.program import Program
from tests import packed
from tools.benchmarks import plain_decoder
from tools.benchmarks.peers import peer_bigtrain

QUICKSTART = pathlib.Path(__file__).parent.parent / "experiments" / "quickstart.py"


@pytest.fixture
def quickstart():
  """The quickstart's model, smaller, on made-up packed rows with padding."""
  e: Any = load(str(QUICKSTART))[0]
  e.model.vocab, e.model.dim, e.model.layers = packed.V, 32, 2
  e.data, e.batch, e.steps = packed.Packed(), 8, 6
  e.optimizer.schedule.warmup, e.optimizer.lr = 3, 0.03  # Updates that show in the loss.
  return e


def perturbed(model):
  """Random everywhere: zeros, as products that write to the residual stream are, hide layers."""
  leaves, tree = jax.tree.flatten(model)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, moved)


def test_the_plain_decoder_has_the_losses_of_bigtrain(quickstart):
  program, data = Program(quickstart, None), quickstart.data.make(0)
  state = jax.jit(program.init)(jax.random.key(0))
  state = dataclasses.replace(state, model=jax.jit(perturbed)(state.model))
  plain = plain_decoder.start(plain_decoder.parameters(state.model))
  step, plain_step = jax.jit(program.step), plain_decoder.make_step(quickstart)
  losses = []
  for i in range(5):
    batch = jax.device_put(data.batch(8 * i, 8))
    state, metrics = step(state, batch)
    plain, plain_loss = plain_step(plain, batch)
    losses.append((metrics["loss"], plain_loss))
  ours, theirs = np.array(losses).T
  np.testing.assert_allclose(theirs, ours, rtol=1e-5)
  assert abs(ours[0] / ours[-1] - 1) > 0.01  # Something was learnt, or the updates go untested.


def test_the_benchmark_of_overhead_compares_the_two(quickstart, monkeypatch, capsys):
  monkeypatch.syspath_prepend(str(pathlib.Path(plain_decoder.__file__).parent))
  from tools.benchmarks import overhead

  quickstart.evaluation.prompts = ()
  monkeypatch.setattr(jax, "device_count", lambda: 1)  # The plain decoder knows of no mesh.
  monkeypatch.setattr(overhead, "experiment", lambda c: quickstart)
  overhead.main(overhead.Settings(batch=8, steps=1, blocks=2))
  shown = capsys.readouterr().out
  assert "A bigtrain" in shown and "B plain jax" in shown and "host of A" in shown


def test_a_peer_takes_the_steps_that_it_is_asked_for_and_learns(monkeypatch, capsys):
  sizes = {"layers": 1, "dim": 32, "heads": 2, "length": 8, "rows": 4, "vocab": 16}
  asked = json.dumps(sizes | {"dtype": "float32", "kernel": "auto"}) + "\n1\n20\n"
  monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
  peer_bigtrain.main()
  (_, _, first), (wall, cpu, last) = map(json.loads, capsys.readouterr().out.splitlines())
  assert abs(first - np.log(sizes["vocab"])) < 0.2 and wall > 0 and cpu > 0
  assert last < first - 0.01
