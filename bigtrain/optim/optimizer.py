"""What optimizers share: learning rates, clipping, decay and averaging around their own step.

A new optimizer is one file with a subclass of `Optimizer` that says what its `direction` is.
"""

import abc
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from bigtrain.config import Refused, config, nearest
from bigtrain.experiment import OptimizerConfig
from bigtrain.optim import clip
from bigtrain.optim.average import track_average
from bigtrain.optim.moments import Moments, kept
from bigtrain.optim.schedule import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay
from bigtrain.width import Width

Factor = Callable[..., float]  # Of the parameter `w` at a key path: (path, w) -> factor.


@config
class Optimizer(OptimizerConfig):
  """weights -= rate * (direction of the clipped gradient + weight_decay * weights).

  In a wider model (Mup) the direction, but not the decay, has a factor of its own: `width_rule`.
  """

  lr: float  # Peak learning rate.
  schedule: Constant | Cosine | InverseSqrt | Linear | WarmupStableDecay = Cosine()
  # (regular expression, factor): of the learning rate of parameters in whose path it is found, such
  # as ".norm.scale_D.value". Factors of several multiply; 0 freezes.
  rates: tuple[tuple[str, float], ...] = ()
  weight_decay: float = 0.0  # Decoupled, times the learning rate (arXiv:1711.05101).
  # Regular expression searched in a parameter's path: these do not decay. None: all decay.
  no_decay: str | None = "scale|bias"
  clip: float | None = 1.0  # Largest global norm of the gradient; GPT-3's (arXiv:2005.14165).
  clip_value: float | None = None  # Largest magnitude of an element of the gradient.
  # Largest norm of a unit's gradient, as a share of the norm of its weights: adaptive clipping,
  # 0.01 in Brock 2021, arXiv:2102.06171. A unit is one column of a layer's matrix (layout.py).
  clip_unit: float | None = None
  # How the direction's means of gradients and of their squares are kept between updates: float32,
  # or rounded at random to bfloat16 or to eight bits (moments.py).
  moments: Moments = "float32"
  average: float | None = None  # Decay of a moving average of the weights, as in 0.999.

  @abc.abstractmethod
  def direction(self) -> optax.GradientTransformation:
    """What the optimizer makes of the gradient, before decay and learning rate."""

  def width_rule(self, width: Width) -> Factor:
    """What the direction of a parameter is multiplied by in a model of that width."""
    raise Refused(
      f"optimizer: there is no rule for {type(self).__name__} with Mup; take AdamW, Lion, SGD or "
      f"Muon, or give a class of your own a `width_rule`"
    )

  def make(self, steps: int, width: Width | None = None) -> optax.GradientTransformation:
    return optax.chain(*filter(None, self.links(steps, width)))

  def links(self, steps: int, width: Width | None) -> list[optax.GradientTransformation | None]:
    """What an update goes through in turn, from the gradient on; None is left out."""
    direction = self.direction()
    if not isinstance(direction, optax.GradientTransformation):
      raise Refused(f"{type(self).__name__}.direction() returned {direction}, not a transformation")
    return [
      None if self.clip_value is None else clip.by_value(self.clip_value),
      None if self.clip_unit is None else clip.by_unit(self.clip_unit),
      None if self.clip is None else clip.by_global_norm(self.clip),
      kept(self.moments, direction),
      None if width is None else self._scale_by_width(width),
      decay_weights(self.weight_decay, self.no_decay) if self.weight_decay else None,
      scale_by_rates(self.learning_rate(steps), self.factor, [name for name, _ in self.rates]),
      None if self.average is None else track_average(self.average),
    ]

  def _scale_by_width(self, width: Width) -> optax.GradientTransformation:
    for name in ("clip_value", "clip_unit"):
      if getattr(self, name) is not None:
        raise Refused(f"optimizer: {name} does not hold in a wider model (Mup); take `clip` alone")
    return scale_by_factors(self.width_rule(width))

  def learning_rate(self, steps: int) -> optax.Schedule:
    return self.schedule.make(self.lr, steps)

  def factor(self, path, w) -> float:
    """Of the learning rate, for the parameter `w` at a key path."""
    name = jax.tree_util.keystr(path)
    return math.prod(factor for pattern, factor in self.rates if re.search(pattern, name))

  def check(self) -> None:
    if not self.lr > 0:
      raise Refused(f"lr is {self.lr}; it must be above 0")
    if self.weight_decay < 0:
      raise Refused(f"weight_decay is {self.weight_decay}; it is at least 0, as in 0.1")
    for name in ("clip", "clip_value", "clip_unit"):
      limit = getattr(self, name)
      if limit is not None and not limit > 0:
        raise Refused(f"{name} is {limit}; it is a limit above 0, or None for no clipping")
    if self.average is not None and not 0 < self.average < 1:
      raise Refused(f"average is {self.average}; it lies between 0 and 1, as 0.999; None for none")
    check_pattern("no_decay", self.no_decay)
    for pattern, factor in self.rates:
      check_pattern("rates", pattern)
      if factor < 0:
        raise Refused(f"rates: the factor of {pattern!r} is {factor}; it is at least 0 (frozen)")


def check_pattern(name: str, pattern: str | None) -> None:
  """Refuses what is no regular expression, or is found everywhere."""
  if pattern == "":
    raise Refused(f'{name} is "", which every path matches; None is for none')
  try:
    re.compile(pattern or "")
  except re.error as error:
    raise Refused(f"{name} is no regular expression: {error}: {pattern!r}") from None


def decay_weights(rate: float, spared: str | None) -> optax.GradientTransformation:
  """Adds `rate` times the weight to each update, but where `spared` is found in the path."""

  def update(updates, params):
    def decayed(path, u, weight):
      if spared is not None and re.search(spared, jax.tree_util.keystr(path)):
        return u
      return u + rate * weight

    return jax.tree_util.tree_map_with_path(decayed, updates, params)

  return optax.stateless(update)


def scale_by_factors(factor: Factor) -> optax.GradientTransformation:
  """Times the factor of each parameter."""

  def scaled(path, u):
    own = factor(path, u)
    return u if own == 1.0 else own * u

  return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def scale_by_rates(
  rate: optax.Schedule, factor: Factor, patterns: list[str]
) -> optax.GradientTransformation:
  """Times the learning rate, and times the factor of each parameter, downhill.

  The update takes an argument `lowered`: a factor of all learning rates (Faults.policy).

  Raises:
    Refused: when it meets parameters, if one of `patterns` is found in no path of them.
  """
  common, own = optax.scale_by_learning_rate(rate), scale_by_factors(factor)

  def init(params):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    for pattern in patterns:
      if not any(re.search(pattern, path) for path in paths):
        raise Refused(
          f"rates: {pattern!r} is found in no parameter's path{nearest(pattern, paths)}"
        )
    return common.init(params)

  def update(updates, state, params=None, *, lowered: Any = None, **_):
    updates, state = common.update(updates, state, params)
    updates, _ = own.update(updates, optax.EmptyState())
    return updates if lowered is None else jax.tree.map(lambda u: u * lowered, updates), state

  return optax.GradientTransformationExtraArgs(init, update)
