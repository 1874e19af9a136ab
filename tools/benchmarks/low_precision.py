"""The loss in low precision over that in bfloat16, after 500 steps of a small model on real prose.

    uv run tools/benchmarks/low_precision.py [--steps 500]

The quickstart's model and corpus, smaller; every row has the same seed, the same batches and
bfloat16 activations. The loss is the mean over the last tenth of the steps.
"""

import argparse
import copy
import importlib.util
import pathlib
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import stored
from bigtrain.experiment import Experiment
from bigtrain.products import Delayed, Gradients, Products
from bigtrain.program import Program

QUICKSTART = pathlib.Path(__file__).parents[2] / "experiments" / "quickstart.py"
FLOAT8 = {"format": "float8_e4m3fn", "gradients": Gradients(format="float8_e5m2")}
ROWS = {
  "bfloat16": {},
  "int8, a scale for each channel": {"products": Products()},
  "int8, delayed": {"products": Products(scaling=Delayed())},
  "float8, a scale for each channel": {"products": Products(**FLOAT8)},
  "float8, delayed": {"products": Products(**FLOAT8, scaling=Delayed())},
  "bfloat16 moments": {"moments": "bfloat16"},
  "8-bit moments": {"moments": "int8"},
  "bfloat16 weights": {"weights": "bfloat16"},
  "bfloat16 weights, rounded to the nearest": {"weights": "bfloat16"},
  "int8, 8-bit moments, bfloat16 weights": {
    "products": Products(),
    "moments": "int8",
    "weights": "bfloat16",
  },
}


def small(steps: int) -> Experiment:
  spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  e = module.base()
  e.model.dim, e.model.layers, e.model.unroll, e.model.dtype = 64, 2, 2, "bfloat16"
  e.model.pattern[0].feed_forward.hidden = 256
  e.data.seq, e.batch, e.steps = 64, 8, steps
  return e


def loss(e: Experiment) -> float:
  """The mean over the last tenth of the steps."""
  program, data = Program(e, None), e.data.make(e.seed)
  leaves = jax.tree.leaves(program.compile_init()(jax.random.key(e.seed)))
  step = program.compile_step(data.spec(e.batch))
  losses = []
  for i in range(e.steps):
    leaves, metrics = step(leaves, data.batch(i * e.batch, e.batch))
    losses.append(metrics["loss"])
  return float(np.mean(losses[-max(e.steps // 10, 1) :]))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=500)
  base, found = small(parser.parse_args().steps), {}
  print("| | loss | over bfloat16 | seconds |\n|---|---|---|---|")
  for name, changes in ROWS.items():
    e, start = copy.deepcopy(base), time.perf_counter()
    e.products = changes.get("products")
    e.weights = changes.get("weights", "float32")
    e.optimizer.moments = changes.get("moments", "float32")
    nearest = mock.patch.object(stored, "to_bfloat16", lambda x, key: x.astype(jnp.bfloat16))
    if "nearest" in name:
      with nearest:
        found[name] = loss(e)
    else:
      found[name] = loss(e)
    ratio, seconds = found[name] / found["bfloat16"], time.perf_counter() - start
    print(f"| {name} | {found[name]:.4f} | {ratio:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
  main()
