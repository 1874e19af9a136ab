"""Each element's gradient over the root of its past squares: their sum (Adagrad), or their mean."""

import optax

from bigtrain.config import Refused, config
from bigtrain.optim.adam import check_decay, check_positive
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.width import Width


@config
class Adagrad(Optimizer):
  """Duchi 2011, jmlr.org/papers/v12/duchi11a.html."""

  start: float = 0.0  # Of the sum of squares; above 0 it damps the first steps.
  eps: float = 1e-10  # Added to the sum.

  def direction(self) -> optax.GradientTransformation:
    return optax.scale_by_rss(self.start, self.eps)

  def width_rule(self, width: Width) -> Factor:
    if self.start:
      raise Refused("optimizer: with Mup, Adagrad's start must be 0: gradients fall with the width")
    return lambda path, w: width.of_signs(path)

  def check(self) -> None:
    Optimizer.check(self)
    check_positive(eps=self.eps)
    if self.start < 0:
      raise Refused(f"start is {self.start}; it is a sum of squares, at least 0")


@config
class RMSProp(Optimizer):
  """Tieleman & Hinton 2012, lecture 6e; a mean from zero, without correction."""

  decay: float = 0.9  # Of the mean of the gradient's square.
  eps: float = 1e-8  # Added to the root of that mean.
  momentum: float = 0.0  # Of the scaled gradient; 0 for none.

  def direction(self) -> optax.GradientTransformation:
    scaled = optax.scale_by_rms(self.decay, self.eps, eps_in_sqrt=False)
    return optax.chain(scaled, optax.trace(self.momentum)) if self.momentum else scaled

  def width_rule(self, width: Width) -> Factor:
    return lambda path, w: width.of_signs(path)

  def check(self) -> None:
    Optimizer.check(self)
    check_decay(decay=self.decay, momentum=self.momentum)
    check_positive(eps=self.eps)
