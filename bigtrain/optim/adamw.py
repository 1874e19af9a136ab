"""AdamW: Adam's moments with decoupled weight decay."""

import optax

from bigtrain.config import Refused, config
from bigtrain.optim.optimizer import Optimizer


@config
class AdamW(Optimizer):
  """Loshchilov 2017, arXiv:1711.05101. The defaults but `lr` are GPT-3's (arXiv:2005.14165)."""

  b1: float = 0.9  # Decay of the mean of the gradient.
  b2: float = 0.95  # Decay of the mean of its square.
  eps: float = 1e-8  # Added to the root of that mean.
  weight_decay: float = 0.1  # Decoupled, times the learning rate.

  def direction(self) -> optax.GradientTransformation:
    return optax.scale_by_adam(self.b1, self.b2, self.eps)

  def check(self) -> None:
    Optimizer.check(self)
    for name, beta in (("b1", self.b1), ("b2", self.b2)):
      if not 0 <= beta < 1:
        raise Refused(f"{name} is {beta}; it is the decay of a mean, from 0 to below 1")
    if not self.eps > 0:
      raise Refused(f"eps is {self.eps}; it must be above 0, as in 1e-8")
