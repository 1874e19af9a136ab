"""Learning-rate schedules. Update number s, from 0, is made at the rate of s.

Every schedule first rises: update s of the warm-up has (s + 1) / warmup of the rate, so that none
is wasted at rate 0. Those that fall reach `final` at s = steps, one update after the last.
"""

import abc
import math

import jax
import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config


@config
class Schedule(abc.ABC):
  """A rise and what follows it. A run is at least as long as its warm-up."""

  warmup: int = 100  # Steps until the peak; Adam wants about 2 / (1 - b2) (arXiv:1910.04209).

  def make(self, lr: float, steps: int) -> optax.Schedule:
    """The rate as a function of the update's number, for a run of `steps` with its peak at `lr`."""

    def rate(step) -> jax.Array:
      rise = jnp.minimum(1.0, (step + 1) / max(self.warmup, 1))
      return lr * rise * self.share(step, steps)

    return rate

  @abc.abstractmethod
  def share(self, step, steps: int) -> jax.Array | float:
    """The share of the peak after the warm-up; 1 during it."""

  def check(self) -> None:
    if self.warmup < 0:
      raise Refused(f"warmup is {self.warmup}; it is a number of steps, 0 for none")


@config
class Constant(Schedule):
  """The peak until the end."""

  warmup: int = 0  # Steps until the peak.

  def share(self, step, steps: int) -> float:
    return 1.0


@config
class InverseSqrt(Schedule):
  """sqrt(warmup / (s + 1)), whatever the length of the run (Vaswani 2017, arXiv:1706.03762)."""

  warmup: int = 10_000  # Steps until the peak; T5's (arXiv:1910.10683).

  def share(self, step, steps: int) -> jax.Array:
    return jnp.sqrt(self.warmup / jnp.maximum(step + 1, self.warmup))

  def check(self) -> None:
    if self.warmup < 1:
      raise Refused(f"warmup is {self.warmup}; InverseSqrt falls from its end, so give 1 or more")


@config
class Falling(Schedule):
  """A schedule that ends at a share of its peak."""

  final: float = 0.0  # Share of the peak at the end.

  def share(self, step, steps: int) -> jax.Array:
    left = self.left(step, steps)
    return left + (1 - left) * self.final

  @abc.abstractmethod
  def left(self, step, steps: int) -> jax.Array:
    """How much of the fall is left: 1 before it, 0 at the end."""

  def check(self) -> None:
    Schedule.check(self)
    if not 0 <= self.final <= 1:
      raise Refused(f"final is {self.final}; it is a share of the peak, from 0 to 1")


@config
class Linear(Falling):
  """A straight fall from the end of the warm-up on."""

  def left(self, step, steps: int) -> jax.Array:
    return _left(step, steps, steps - self.warmup)


@config
class Cosine(Falling):
  """Half a cosine from the end of the warm-up on (Loshchilov 2016, arXiv:1608.03983)."""

  final: float = 0.1  # Share of the peak at the end; GPT-3's (arXiv:2005.14165).

  def left(self, step, steps: int) -> jax.Array:
    return (1 - jnp.cos(math.pi * _left(step, steps, steps - self.warmup))) / 2


@config
class WarmupStableDecay(Falling):
  """The peak, then a straight fall at the very end (Hu 2024, arXiv:2404.06395)."""

  decay: float = 0.2  # Share of the run; longer falls gain little (arXiv:2405.18392).

  def left(self, step, steps: int) -> jax.Array:
    return _left(step, steps, self.decay * steps)

  def check(self) -> None:
    Falling.check(self)
    if not 0 < self.decay <= 1:
      raise Refused(f"decay is {self.decay}; it is a share of the run, above 0 and at most 1")


def _left(step, steps: int, span: float) -> jax.Array:
  """What is left of a straight fall over the last `span` steps."""
  return jnp.clip((steps - step) / max(span, 1), 0.0, 1.0)
