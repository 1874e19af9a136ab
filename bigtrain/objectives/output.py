"""What every objective returns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bigtrain.experiment import SOURCE

Sums = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight): their ratio is meant.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What an objective says about a batch. Two Outputs add leaf by leaf, `variables` aside."""

  loss_sum: jax.Array  # What is differentiated, summed over the batch, float32.
  weight: jax.Array  # What `loss_sum` is divided by.
  metrics: Sums
  # The second part of `state.partition(model)` as it is after this batch; None if unchanged.
  variables: Any = None
  # Tokens that each expert had, by the path of their layer: (repeats, X). Nothing but experts has
  # these, and objectives/experts.py puts them here.
  loads: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  # Statistics of the layers, by name (taps.py); the training step puts them here.
  taps: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  # The largest magnitudes that low products have met (marks.py); the training step puts them here.
  amax: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


def mean(value: jax.Array, weight: jax.Array) -> jax.Array:
  """`value / weight`; of nothing, as where a batch is padding alone, 0, unless the sum is NaN."""
  return value / jnp.where(weight == 0, 1, weight)


def by_source(batch: dict[str, jax.Array], loss: jax.Array, weights: jax.Array) -> Sums:
  """`loss/<name>` of each source, where the data is a mixture.

  Args:
    batch: what the loss is of.
    loss: (B, ...), weighted; its sum is the whole loss.
    weights: of the same elements.
  """
  found = {}
  for name in filter(lambda name: name.startswith(SOURCE), batch):
    of = jnp.expand_dims(batch[name] > 0, range(1, weights.ndim))  # NaN elsewhere is not its own.
    parts = (jnp.where(of, x, 0).sum() for x in (loss, weights))
    found[f"loss/{name.removeprefix(SOURCE)}"] = (*parts,)
  return found
