"""Which weight products are made of eight bits, in which format and how scaled: the settings.

marks.py finds the parameters that these are about, quantized.py has the arithmetic.
"""

import re
from typing import Literal

from bigtrain.config import Refused, config


@config
class Current:
  """Scales of what is at hand: its largest magnitude becomes the largest number of the format."""

  # One scale for a whole tensor, or for each row and each column that is summed over: of x for each
  # token, of w for each output; of the gradient, for each token and each output.
  scales: Literal["channel", "tensor"] = "channel"


@config
class Delayed:
  """One scale for a tensor, from the updates before (Transformer Engine; arXiv:2209.05433).

  Nothing is read twice, once to measure it and once to round it. What is larger than the largest
  number is cut to it. The first update has nothing to go by, and takes magnitudes up to 8.
  """

  history: int = 16  # Updates of which the largest magnitude counts.

  def check(self) -> None:
    if self.history < 1:
      raise Refused(f"history is {self.history}; it is a number of updates, at least 1")


@config
class Gradients:
  """The products of the backward pass: of incoming gradients with weights, and with inputs."""

  format: Literal["int8", "float8_e4m3fn", "float8_e5m2"] = "int8"  # Of incoming gradients.
  weights: bool = True  # Also those with inputs, which make the gradients of weights.


@config
class Products:
  """Weight products in eight bits, each operand with a scale (arXiv:2105.03536 for int8).

  The operands are rounded to the nearest, sums are exact (int8) or in float32. Gradients are those
  of the product of the rounded operands, as if rounding were the identity.
  """

  format: Literal["int8", "float8_e4m3fn"] = "int8"  # Of inputs and weights.
  gradients: Gradients | None = Gradients()  # None: the backward pass is in the compute dtype.
  scaling: Current | Delayed = Current()
  # Regular expressions searched in parameters' paths, such as "attention" or r"segments\[0\]": the
  # products of these stay in the compute dtype.
  high: tuple[str, ...] = ()

  def check(self) -> None:
    if self.gradients is not None and (self.format == "int8") != (self.gradients.format == "int8"):
      raise Refused(
        f"products: {self.format} cannot be multiplied with gradients in {self.gradients.format}; "
        "give both int8, or float8_e4m3fn and a float8 format"
      )
    for pattern in self.high:
      try:
        re.compile(pattern)
      except re.error as error:
        raise Refused(f"products: high: no regular expression: {error}: {pattern!r}") from None
      if not pattern:
        raise Refused('products: high has "", which every path matches; set products to None')
