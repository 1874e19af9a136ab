"""Width transfer: what is multiplied in a wide model so that a narrow one's learning rate holds.

The rules are muP's, as in table 8 of Yang 2022, arXiv:2203.03466. A model's widths are those of the
residual stream, of hidden units and of all heads together; they grow in proportion. A weight is
hidden where both of its sides grow; where one does (tables, outputs, biases, scales) it is a vector
of the width; what no width enters is fixed. `models.initial.Mup` switches this on.
"""

import dataclasses
import re

import jax

WIDE = frozenset("DFKGHM")  # Letters of dims that grow with the model.
# Weights all of whose letters are wide, and parameters that have no such letter, in a path.
HIDDEN = r"(?<!bias)_[DFKGHM]{2,}\b"
FIXED = r"bias_[VC]\b"


@dataclasses.dataclass(frozen=True)
class Width:
  """How many times wider a model is than its base, whose learning rate was tuned."""

  ratio: float  # Of residual stream, hidden units and all heads together.
  head: float = 1.0  # Of one head.
  hidden: str = HIDDEN  # Regular expression of the paths of hidden weights.
  fixed: str = FIXED  # Of parameters that no width enters.

  def scores(self) -> float:
    """Factor of attention scores: with head_dim**-0.5 it makes them sums over 1 / head_dim."""
    return self.head**-0.5

  def is_hidden(self, path) -> bool:
    return bool(re.search(self.hidden, jax.tree_util.keystr(path)))

  def of_signs(self, path) -> float:
    """Factor of a direction whose elements are about 1 whatever the gradient's: Adam's and kin."""
    return 1 / self.ratio if self.is_hidden(path) else 1.0

  def of_gradients(self, path) -> float:
    """Factor of a direction as large as the gradient, whose elements fall as the width grows."""
    name = jax.tree_util.keystr(path)
    if self.is_hidden(path) or re.search(self.fixed, name):
      return 1.0
    return self.head if re.search("[qk]_norm", name) else self.ratio


def readout(x, width: Width | None):
  """What enters the product that makes the logits, or its table, divided by the width's growth."""
  return x if width is None else x / width.ratio
