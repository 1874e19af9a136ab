"""An exponential moving average of the weights, kept beside them in the optimizer's state.

The average after t updates weighs the weights of update i with decay^(t - i), divided by the sum of
these factors: nothing is left of the initial weights (Adam's correction, arXiv:1412.6980).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Average(NamedTuple):
  """The state of `track_average`."""

  count: jax.Array  # Updates seen.
  weights: optax.Params


def track_average(decay: float) -> optax.GradientTransformation:
  """Passes the updates through; as the last link of a chain it sees the weights they lead to."""

  def init(params) -> Average:
    return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates, state: Any, params: Any = None):
    count = state.count + 1
    new = optax.apply_updates(params, updates)
    # Near decay 1 the difference 1 - decay^count is all rounding; expm1 has every digit.
    share = (decay - 1) / jnp.expm1(count * math.log(decay))
    mix = lambda old, new: ((1 - share) * old + share * new).astype(old.dtype)
    return updates, Average(count, jax.tree.map(mix, state.weights, new))

  return optax.GradientTransformation(init, update)


def averaged(opt_state: optax.OptState, model: nnx.Module) -> nnx.Module:
  """`model` with its averaged weights; `model` itself if the optimizer keeps no average.

  Before the first update the average is the initial weights.
  """
  is_average = lambda node: isinstance(node, Average)
  for node in jax.tree.leaves(opt_state, is_leaf=is_average):
    if is_average(node):
      return node.weights
  return model
