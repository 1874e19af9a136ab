"""Schedule-free AdamW: an average of the weights in place of a falling learning rate."""

import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config
from bigtrain.optim.adam import check_decay, check_positive
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.optim.schedule import Constant
from bigtrain.width import Width


@config
class ScheduleFreeAdamW(Optimizer):
  """Defazio 2024, arXiv:2405.15682, algorithm 1.

  Three sequences: z, which Adam's steps move; x, its average, weighted by the square of the rate;
  and y between both, where gradients are taken and weights decay. A run's weights are y; what is
  evaluated, sampled and exported is x (average.py).
  """

  schedule: Constant = Constant(warmup=100)  # It need not fall.
  b1: float = 0.9  # How far y lies from z towards x.
  b2: float = 0.95  # Decay of the mean of the gradient's square.
  eps: float = 1e-8  # Added to the root of that mean.
  weight_decay: float = 0.1  # At y, times the learning rate.

  def direction(self) -> optax.GradientTransformation:
    return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)

  def width_rule(self, width: Width) -> Factor:
    return lambda path, w: width.of_signs(path)

  def make(self, steps: int, width: Width | None = None) -> optax.GradientTransformation:
    rate = self.learning_rate(steps)
    # optax counts from 1 here, and in the schedule of the steps that it averages from 0.
    averaging = lambda count: jnp.asarray(rate(count - 1))
    return optax.contrib.schedule_free(Optimizer.make(self, steps, width), averaging, self.b1)

  def check(self) -> None:
    Optimizer.check(self)
    check_decay(b1=self.b1, b2=self.b2)
    check_positive(b1=self.b1, eps=self.eps)
    if self.average is not None:
      raise Refused("average is set, but ScheduleFreeAdamW is an average itself; set it to None")
