"""Stochastic gradient descent with momentum."""

import optax

from bigtrain.config import Refused, config
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.width import Width


@config
class SGD(Optimizer):
  """velocity = momentum * velocity + gradient; a step goes along the velocity."""

  momentum: float = 0.9  # 0 for none.
  nesterov: bool = False  # Look one step of momentum ahead (Sutskever 2013).

  def direction(self) -> optax.GradientTransformation:
    if not self.momentum:
      return optax.identity()
    return optax.trace(self.momentum, self.nesterov)

  def width_rule(self, width: Width) -> Factor:
    return lambda path, w: width.of_gradients(path)

  def check(self) -> None:
    Optimizer.check(self)
    if not 0 <= self.momentum < 1:
      raise Refused(f"momentum is {self.momentum}; it is a decay, from 0 to below 1")
    if self.moments != "float32" and not self.momentum:
      raise Refused(f"moments is {self.moments}, but momentum is 0; set moments to float32")
    if self.nesterov and not self.momentum:
      raise Refused("nesterov needs momentum, which is 0; set momentum to 0.9, or nesterov False")
