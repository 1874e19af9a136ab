"""The record competes on equal terms, and every run of its benchmark is an experiment."""

import math
import pathlib

import jax
import pytest

from bigtrain.load import functions
from bigtrain.validate import validate
from tools.benchmarks import speedrun

MADE = functions(pathlib.Path(__file__).parent.parent / "experiments" / "speedrun.py")


def test_the_record_has_the_size_the_data_and_the_batch_of_the_baseline_and_fewer_steps():
  base, record = MADE["base"](), MADE["record"]()
  assert (record.data, record.batch, record.seed) == (base.data, base.batch, base.seed)
  assert record.objective == base.objective and record.evaluation == base.evaluation
  assert record.steps <= speedrun.LIMIT * base.steps
  shapes = [jax.eval_shape(lambda e=e: e.model.make(jax.random.key(0))) for e in (base, record)]
  sizes = [sum(math.prod(x.shape) for x in jax.tree.leaves(model)) for model in shapes]
  assert abs(sizes[1] / sizes[0] - 1) < 0.01


@pytest.mark.parametrize("name", ["sweep", "seeds", "ablation"])
def test_every_run_of_a_study_is_valid_and_has_a_name_of_its_own(name):
  runs = speedrun.studies(name)
  assert len({run[:2] for run in runs}) == len(runs)
  made = [make() for *_, make in runs]
  for e in made:
    validate(e)
  assert name == "seeds" or all(a != b for i, a in enumerate(made) for b in made[:i])


def test_the_baseline_is_the_best_cell_of_the_sweep():
  e = MADE["base"]()
  speedrun.BEST.apply(e)
  assert e == MADE["base"]()
