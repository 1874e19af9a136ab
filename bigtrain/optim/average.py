"""Averages of the weights, kept beside them in the optimizer's state: what is evaluated.

An optimizer may keep a moving average (`track_average`) or be an average itself (schedule_free.py):
`averaged` finds either. The moving average after t updates weighs the weights of update i with
decay^(t - i), divided by the sum of these factors: nothing is left of the initial weights (Adam's
correction, arXiv:1412.6980).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigtrain.optim.on_host import on_device


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


def averaged(opt_state: optax.OptState, model: Any) -> Any:
  """`model` with the weights to evaluate; `model` itself if the optimizer keeps no average.

  Before the first update the average is the initial weights.
  """
  kinds = (Average, optax.contrib.ScheduleFreeState)
  for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds)):
    if isinstance(node, Average):
      return on_device(node.weights)
    if isinstance(node, optax.contrib.ScheduleFreeState):
      return optax.contrib.schedule_free_eval_params(on_device(node), model)
  return model
