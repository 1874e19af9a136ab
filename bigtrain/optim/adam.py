"""Adam and what differs from it by a term: NAdam and AdEMAMix."""

import math

import jax
import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.width import Width


@config
class Adam(Optimizer):
  """Kingma & Ba 2014, arXiv:1412.6980: the mean of the gradient over the root of its square's."""

  b1: float = 0.9  # Decay of the mean of the gradient.
  b2: float = 0.999  # Decay of the mean of its square.
  eps: float = 1e-8  # Added to the root of that mean.

  def direction(self) -> optax.GradientTransformation:
    return optax.scale_by_adam(self.b1, self.b2, self.eps)

  def width_rule(self, width: Width) -> Factor:
    return lambda path, w: width.of_signs(path)

  def check(self) -> None:
    Optimizer.check(self)
    check_decay(b1=self.b1, b2=self.b2)
    check_positive(eps=self.eps)


@config
class NAdam(Adam):
  """Adam, a step of momentum ahead (Dozat 2016, openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ)."""

  def direction(self) -> optax.GradientTransformation:
    return optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=True)


@config
class AdEMAMix(Adam):
  """Adam with a second, slow mean of the gradient (Pagliardini 2024, arXiv:2409.03137)."""

  b3: float = 0.9999  # Decay of the slow mean, once it has risen.
  alpha: float = 5.0  # Weight of the slow mean beside the fast one, once it has risen.
  rise: int = 10_000  # Steps in which b3 rises from b1, and alpha from 0; the paper's run length.

  def direction(self) -> optax.GradientTransformation:
    fast, slow = math.log(self.b1), math.log(self.b3)
    # optax counts updates from 0, the paper from 1.
    risen = lambda count: jnp.minimum(1.0, (count + 1).astype(float) / self.rise)

    def decay(count) -> jax.Array:  # Its half-life rises evenly.
      return jnp.exp(fast * slow / (slow + risen(count) * (fast - slow)))

    share = lambda count: self.alpha * risen(count)
    return optax.contrib.scale_by_ademamix(self.b1, self.b2, decay, share, self.eps)

  def check(self) -> None:
    Adam.check(self)
    check_decay(b3=self.b3)
    if not 0 < self.b1 <= self.b3:
      raise Refused(f"b1 is {self.b1}; the fast mean's decay lies above 0 and below b3, {self.b3}")
    if self.alpha < 0:
      raise Refused(f"alpha is {self.alpha}; it is a weight of at least 0, as in 5")
    if self.rise < 1:
      raise Refused(f"rise is {self.rise}; it is a number of steps, 1 for none")


def check_decay(**betas: float) -> None:
  """Refuses what is no decay of a mean."""
  for name, beta in betas.items():
    if not 0 <= beta < 1:
      raise Refused(f"{name} is {beta}; it is the decay of a mean, from 0 to below 1")


def check_positive(**values: float) -> None:
  """Refuses what is not above 0."""
  for name, value in values.items():
    if not value > 0:
      raise Refused(f"{name} is {value}; it must be above 0, as in 1e-8")
