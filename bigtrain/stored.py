"""Parameters as they are stored: float32, or matrices in bfloat16 that are updated in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from bigtrain.optim.layout import layout
from bigtrain.rounding import to_bfloat16

ROUNDING = 2**32 - 1  # What a step's key is folded with: beside what the objective splits off it.


def narrowed(weights: str, model: Any) -> Any:
  """Fresh parameters as `Experiment.weights` has them; vectors stay as they are."""
  if weights == "float32":
    return model
  narrow = lambda path, w: w.astype(weights) if layout(path, w).rows else w
  return jax.tree_util.tree_map_with_path(narrow, model)


def widened(tree: Any) -> Any:
  """Every array in float32, or wider."""
  return jax.tree.map(lambda w: w.astype(jnp.promote_types(w.dtype, jnp.float32)), tree)


def updated(model: Any, updates: Any, key: jax.Array) -> Any:
  """The parameters behind an update, in the dtypes that they have.

  The sum is in float32; what is kept in bfloat16 is rounded at random (rounding.py), for nearest
  rounding would lose every update below 1/512 of its weight.

  Args:
    model: parameters.
    updates: what is added to them, float32.
    key: that of the step.
  """
  key = jax.random.fold_in(key, ROUNDING)
  number = iter(range(len(jax.tree.leaves(model))))

  def add(w, update):
    i, new = next(number), w.astype(jnp.promote_types(w.dtype, jnp.float32)) + update
    return to_bfloat16(new, jax.random.fold_in(key, i)) if w.dtype == jnp.bfloat16 else new

  return jax.tree.map(add, model, updates)
