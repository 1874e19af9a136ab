import dataclasses

import jax
import numpy as np
import pytest

from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from tests import runs


@pytest.mark.usefixtures("prepared")
def test_a_batch_of_all_examples_makes_an_epoch_one_step_down_the_whole_gradient():
  e = runs.base()
  e.model.dropout = 0.0
  data = e.data.make(e.seed)
  rows = data.examples()
  parts = next(n for n in range(2, rows + 1) if rows % n == 0)
  plain = SGD(lr=0.5, momentum=0.0, clip=None, schedule=Constant())
  e = dataclasses.replace(e, batch=rows, microbatches=parts, optimizer=plain)
  program = Program(e, None)
  before = jax.jit(program.init)(jax.random.key(0))
  after, _ = jax.jit(program.step)(before, data.batch(0, rows))

  # The same rows, one by one.
  one = Program(dataclasses.replace(e, microbatches=1), None)
  gradient = jax.jit(lambda row: one.gradient(before.model, before.variables, row, None)[:2])
  total, weight = 0.0, 0.0
  for i in range(rows):
    g, output = gradient(data.batch(i, 1))
    total, weight = total + float(output.weight) * flat(g), weight + float(output.weight)
  np.testing.assert_allclose(
    flat(after.model), flat(before.model) - 0.5 * total / weight, rtol=1e-4, atol=1e-6
  )
  assert np.abs(total / weight).max() > 1e-3


def flat(tree) -> np.ndarray:
  return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
