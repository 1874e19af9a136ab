"""LAMB: Adam's direction, as long in each layer as that layer's weights. For large batches."""

import re

import jax
import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config
from bigtrain.optim.adam import Adam
from bigtrain.optim.layout import layout
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.width import Width


@config
class LAMB(Adam):
  """You 2019, arXiv:1904.00962. As in its code, what does not decay is not scaled either."""

  eps: float = 1e-6  # Added to the root of the mean square.
  weight_decay: float = 0.01  # Before the direction is scaled.

  def width_rule(self, width: Width) -> Factor:
    raise Refused("optimizer: LAMB has no rule for Mup: norms of weights set its rates; take AdamW")

  def links(self, steps: int, width: Width | None) -> list[optax.GradientTransformation | None]:
    *before, rate, average = Optimizer.links(self, steps, width)
    return [*before, scale_by_trust(self.no_decay), rate, average]


def scale_by_trust(spared: str | None) -> optax.GradientTransformation:
  """Each layer's update times norm of weights / norm of update, where neither is 0."""

  def update(updates, params):
    def trusted(path, u, w):
      if spared is not None and re.search(spared, jax.tree_util.keystr(path)):
        return u
      norm = lambda x: jnp.sqrt(jnp.sum(x**2, layout(path, w).axes(w), keepdims=True))
      of_w, of_u = norm(w), norm(u)
      moves = (of_w > 0) & (of_u > 0)
      return u * jnp.where(moves, of_w / jnp.where(moves, of_u, 1), 1)

    return jax.tree_util.tree_map_with_path(trusted, updates, params)

  return optax.stateless(update)
