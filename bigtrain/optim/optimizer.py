"""What optimizers share: learning rate, clipping, weight decay and averaging around their own step.

A new optimizer is one file with a subclass of `Optimizer` that says what its `direction` is.
"""

import abc
import re

import jax
import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config
from bigtrain.experiment import OptimizerConfig
from bigtrain.optim.average import track_average
from bigtrain.optim.schedule import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay


@config
class Optimizer(OptimizerConfig):
  """weights -= rate * (direction of the clipped gradient + weight_decay * weights)."""

  lr: float  # Peak learning rate.
  schedule: Constant | Cosine | InverseSqrt | Linear | WarmupStableDecay = Cosine()
  weight_decay: float = 0.0  # Decoupled, times the learning rate (arXiv:1711.05101).
  # Regular expression searched in a parameter's path, such as ".norm.scale_D.value":
  # these do not decay. None: all decay.
  no_decay: str | None = "scale|bias"
  clip: float | None = 1.0  # Largest global norm of the gradient; GPT-3's (arXiv:2005.14165).
  average: float | None = None  # Decay of a moving average of the weights, as in 0.999.

  @abc.abstractmethod
  def direction(self) -> optax.GradientTransformation:
    """What the optimizer makes of the gradient, before decay and learning rate."""

  def make(self, steps: int) -> optax.GradientTransformation:
    direction = self.direction()
    if not isinstance(direction, optax.GradientTransformation):
      raise Refused(f"{type(self).__name__}.direction() returned {direction}, not a transformation")
    links = [
      self.clip is not None and clip_by_global_norm(self.clip),
      direction,
      self.weight_decay and decay_weights(self.weight_decay, self.no_decay),
      optax.scale_by_learning_rate(self.learning_rate(steps)),
      self.average is not None and track_average(self.average),
    ]
    return optax.chain(*filter(None, links))

  def learning_rate(self, steps: int) -> optax.Schedule:
    return self.schedule.make(self.lr, steps)

  def check(self) -> None:
    if not self.lr > 0:
      raise Refused(f"lr is {self.lr}; it must be above 0")
    if self.weight_decay < 0:
      raise Refused(f"weight_decay is {self.weight_decay}; it is at least 0, as in 0.1")
    if self.clip is not None and not self.clip > 0:
      raise Refused(f"clip is {self.clip}; it is a norm above 0, or None for no clipping")
    if self.average is not None and not 0 < self.average < 1:
      raise Refused(f"average is {self.average}; it lies between 0 and 1, as 0.999; None for none")
    if self.no_decay == "":
      raise Refused('no_decay is "", which every path matches; None lets all parameters decay')
    try:
      re.compile(self.no_decay or "")
    except re.error as error:
      raise Refused(f"no_decay is no regular expression: {error}: {self.no_decay!r}") from None


def global_norm(tree) -> jax.Array:
  """The Euclidean norm of all leaves together, in float32."""
  return optax.tree.norm(optax.tree.cast(tree, jnp.float32))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
  """Scales gradients whose global norm is above `limit` down to it."""

  def update(updates, params):
    scale = jnp.minimum(1.0, limit / global_norm(updates))
    return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)

  return optax.stateless(update)


def decay_weights(rate: float, spared: str | None) -> optax.GradientTransformation:
  """Adds `rate` times the weight to each update, but where `spared` is found in the path."""

  def update(updates, params):
    def decayed(path, u, weight):
      if spared is not None and re.search(spared, jax.tree_util.keystr(path)):
        return u
      return u + rate * weight

    return jax.tree_util.tree_map_with_path(decayed, updates, params)

  return optax.stateless(update)
