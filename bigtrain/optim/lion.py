"""Lion: the sign of a momentum; one number a parameter."""

import optax

from bigtrain.config import config
from bigtrain.optim.adam import check_decay
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.width import Width


@config
class Lion(Optimizer):
  """Chen 2023, arXiv:2302.06675.

  Its rate is 3 to 10 times smaller than AdamW's, and its decay as much larger (section 5).
  """

  b1: float = 0.9  # Share of the momentum in what is taken the sign of.
  b2: float = 0.99  # Decay of the momentum.

  def direction(self) -> optax.GradientTransformation:
    return optax.scale_by_lion(self.b1, self.b2)

  def width_rule(self, width: Width) -> Factor:
    return lambda path, w: width.of_signs(path)

  def check(self) -> None:
    Optimizer.check(self)
    check_decay(b1=self.b1, b2=self.b2)
