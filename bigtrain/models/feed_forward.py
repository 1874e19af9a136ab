"""The position-wise network.

Dims: B batch, T position, D model, F hidden.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.kernels.attention import Tokens
from bigtrain.kernels.fence import fence
from bigtrain.models.activation import Activation, ActivationName
from bigtrain.models.initial import Initializer
from bigtrain.models.remat import Name
from bigtrain.precision import project


@config
class FeedForwardConfig:
  """Up to the hidden units, through the activation, and down."""

  hidden: int  # Units.
  activation: ActivationName = "gelu_tanh"
  gated: bool = False  # The activation multiplies a second product (arXiv:2002.05202).
  bias: bool = False  # On every product.
  dropout: float = 0.0  # Of the hidden units.

  def check(self) -> None:
    if self.hidden < 1:
      raise Refused(f"feed_forward: hidden is {self.hidden}; it must be positive")
    if not 0 <= self.dropout < 1:
      raise Refused(f"feed_forward: dropout is {self.dropout}; it is a rate, from 0 to below 1")

  def dims(self) -> dict[str, tuple[str, int]]:
    """As in ModelConfig: what the mesh must divide."""
    return {"hidden": ("F", self.hidden)}

  def names(self) -> tuple[Name, ...]:
    """What of it remat can keep."""
    return ("up", "gate") if self.gated else ("up",)

  def flops(self, dim: int, length: int) -> float:
    """Training FLOPs of one row: 6 a weight and token."""
    return 6 * length * dim * self.hidden * (3 if self.gated else 2)

  def make(self, dim: int, init: Initializer, key: jax.Array) -> "FeedForward":
    return FeedForward(self, dim, init, key)


class FeedForward(nnx.Module):
  def __init__(self, c: FeedForwardConfig, dim: int, init: Initializer, key: jax.Array):
    self.c = c
    ku, kg, kd = jax.random.split(key, 3)
    sizes = {"D": dim, "F": c.hidden}
    self.up_DF = init.weight(ku, "DF", sizes, fan_in="D")
    self.gate_DF = init.weight(kg, "DF", sizes, fan_in="D") if c.gated else None
    self.down_FD = init.residual(kd, "FD", sizes, fan_in="F")
    self.up_bias_F = init.constant("F", sizes) if c.bias else None
    self.gate_bias_F = init.constant("F", sizes) if c.bias and c.gated else None
    self.down_bias_D = init.constant("D", sizes) if c.bias else None
    self.activation = Activation(c.activation, c.hidden, init)

  def __call__(self, x_BTD: jax.Array, key=None, tokens: Tokens | None = None) -> jax.Array:
    """(B, T, D), of padding too: what `tokens` say matters to experts alone (moe.py)."""
    del tokens
    x_BTD = sharding.shared(x_BTD)
    up_BTF = project("BTD,DF->BTF", x_BTD, self.up_DF, self.up_bias_F)
    up_BTF = checkpoint_name(fence(up_BTF, self.up_DF, "DF"), "up")
    if self.gate_DF is None:
      h_BTF = self.activation(up_BTF)
    else:
      gate_BTF = project("BTD,DF->BTF", x_BTD, self.gate_DF, self.gate_bias_F)
      gate_BTF = checkpoint_name(fence(gate_BTF, self.gate_DF, "DF"), "gate")
      h_BTF = self.activation(gate_BTF) * up_BTF
    h_BTF = dropout(h_BTF, self.c.dropout, key)
    h_BTF = fence(h_BTF, self.down_FD, "FD")
    y_BTD = project("BTF,FD->BTD", h_BTF, self.down_FD, self.down_bias_D)
    return fence(y_BTD, self.down_FD, "FD")
