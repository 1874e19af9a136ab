"""A batch of padding alone: no loss, no gradient, and nothing that is not a number."""

import jax
import numpy as np
import pytest

from bigtrain.mesh import Mesh
from bigtrain.program import Program
from tests import families, packed

PADDING = {"weights": 0, "segments": 0, "target_segments": 0, "positions": -1, "bytes": 0}


def padding(batch: dict) -> dict:
  """The batch with every row empty."""
  return batch | {k: np.full_like(batch[k], v) for k, v in PADDING.items() if k in batch}


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "moe"])
def test_padding_alone_gives_zeros_and_says_that_they_are_of_nothing(name):
  e = families.small(name, Mesh(fsdp=2), "sgd" if name == "vit" else None)
  state = jax.device_put(packed.start(e))
  step = jax.jit(Program(e, None).step, static_argnames="statistics")
  after, metrics = step(state, padding(e.data.make(0).batch(0, e.batch)), statistics=True)
  for x in jax.tree.leaves((after.model, after.optimizer, after.variables, metrics)):
    if np.issubdtype(x.dtype, np.floating):
      assert np.isfinite(x).all()
  assert metrics["loss"] == metrics["gradient_norm"] == metrics["weight"] == 0
  assert not any(jax.tree.leaves(metrics["weights"])) or name == "moe"
