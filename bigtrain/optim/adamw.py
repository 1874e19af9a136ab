"""AdamW: Adam's moments with decoupled weight decay."""

from bigtrain.config import config
from bigtrain.optim.adam import Adam


@config
class AdamW(Adam):
  """Loshchilov 2017, arXiv:1711.05101. The defaults but `lr` are GPT-3's (arXiv:2005.14165)."""

  b2: float = 0.95  # Decay of the mean of its square.
  weight_decay: float = 0.1  # Decoupled, times the learning rate.
