"""Muon: momentum of hidden matrices, orthogonalised; all else by AdamW."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config
from bigtrain.optim.adam import check_decay, check_positive
from bigtrain.optim.layout import TABLES, Layout, is_matrix, map_layers, matrices_by, spread
from bigtrain.optim.optimizer import Factor, Optimizer, check_pattern
from bigtrain.width import Width

# Of x, x x' x and (x x')^2 x: steepest at 0, and every singular value ends between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Iterations on one Gram matrix. Each makes its rounding errors up to a^2 = 12 times as large.
TOGETHER = 5


@config
class Muon(Optimizer):
  """Jordan 2024, kellerjordan.github.io/posts/muon; decay as in Liu 2025, arXiv:2502.16982.

  A matrix is all rows by all columns of one layer (layout.py): heads are not separated.
  """

  momentum: float = 0.95  # Nesterov's.
  iterations: int = 5  # Of Newton-Schulz.
  # Factor of an orthogonal update: `spectral`, sqrt(max(1, columns / rows)), at rates such as 0.02;
  # or `rms`, 0.2 * sqrt(max(rows, columns)): elements as large as AdamW's, at AdamW's rates.
  scale: Literal["spectral", "rms"] = "spectral"
  # Regular expression of matrices that AdamW has: look-up tables, and what inputs and outputs meet.
  spared: str | None = TABLES
  adam_lr: float = 3e-3  # Peak learning rate of what AdamW has.
  b1: float = 0.9  # AdamW's.
  b2: float = 0.95  # AdamW's.
  eps: float = 1e-8  # AdamW's.

  def direction(self) -> optax.GradientTransformation:
    def orthogonal(updates, params):
      return map_layers(self._orthogonal, updates)

    matrix = optax.chain(optax.trace(self.momentum, nesterov=True), optax.stateless(orthogonal))
    return matrices_by(matrix, optax.scale_by_adam(self.b1, self.b2, self.eps), self.spared)

  def factor(self, path, w) -> float:
    own = 1.0 if is_matrix(path, w, self.spared) else self.adam_lr / self.lr
    return own * Optimizer.factor(self, path, w)

  def width_rule(self, width: Width) -> Factor:
    """Hidden weights want updates of one spectral norm at any width (arXiv:2310.17813)."""

    def rule(path, w) -> float:
      if not is_matrix(path, w, self.spared):
        return width.of_signs(path)
      if not width.is_hidden(path):
        name = jax.tree_util.keystr(path)
        raise Refused(
          f"optimizer: only one side of {name} grows with the width, and Muon with Mup has no rule "
          f"for it; name it in `spared`"
        )
      return 1.0 if self.scale == "spectral" else width.ratio**-0.5

    return rule

  def _orthogonal(self, layout: Layout, x: jax.Array) -> jax.Array:
    rows, columns = layout.sides(x)
    if self.scale == "spectral":
      scale = max(1.0, columns / rows) ** 0.5
    else:
      scale = 0.2 * max(rows, columns) ** 0.5

    def local(stack):
      y_LRC = newton_schulz(stack.reshape(-1, rows, columns), self.iterations)
      return ((scale * y_LRC).reshape(stack.shape),)

    stack = x if layout.stack else x[None]
    (y,) = spread(local, (stack,), stack)
    return y if layout.stack else y[0]

  def check(self) -> None:
    Optimizer.check(self)
    check_pattern("spared", self.spared)
    check_decay(momentum=self.momentum, b1=self.b1, b2=self.b2)
    check_positive(adam_lr=self.adam_lr, eps=self.eps)
    if self.iterations < 1:
      raise Refused(f"iterations is {self.iterations}; it is at least 1, as in 5")


def newton_schulz(x_LRC: jax.Array, iterations: int) -> jax.Array:
  """Nearly the orthogonal factor of each matrix: singular values near 1, and their vectors kept.

  An iteration multiplies x by a polynomial p of its Gram matrix g = x x', and the next g is p g p.
  So where rows are long, x itself is multiplied by the product of several p only: 44% fewer
  operations for 5 iterations on a matrix of 1 to 4 (dao-lab.ai/blog/2026/gram-newton-schulz).
  """
  if tall := x_LRC.shape[1] > x_LRC.shape[2]:  # The smaller Gram matrix.
    x_LRC = jnp.swapaxes(x_LRC, 1, 2)
  # Frobenius norms, which no singular value exceeds.
  x_LRC /= jnp.maximum(jnp.sqrt(jnp.sum(x_LRC**2, (1, 2), keepdims=True)), 1e-30)
  at_once = TOGETHER if x_LRC.shape[2] >= 2 * x_LRC.shape[1] else 1
  for done in range(0, iterations, at_once):
    gram_LRR = x_LRC @ jnp.swapaxes(x_LRC, 1, 2)
    x_LRC = _factor(gram_LRR, min(at_once, iterations - done)) @ x_LRC
  return jnp.swapaxes(x_LRC, 1, 2) if tall else x_LRC


def _factor(gram_LRR: jax.Array, iterations: int) -> jax.Array:
  """What so many iterations multiply a matrix by, whose Gram matrix this is."""
  a, b, c = COEFFICIENTS
  identity_RR = jnp.eye(gram_LRR.shape[1], dtype=gram_LRR.dtype)
  polynomial = lambda g_LRR: a * identity_RR + b * g_LRR + c * g_LRR @ g_LRR
  factor_LRR = p_LRR = polynomial(gram_LRR)
  for _ in range(iterations - 1):
    gram_LRR = p_LRR @ gram_LRR @ p_LRR
    p_LRR = polynomial(gram_LRR)
    factor_LRR = p_LRR @ factor_LRR
  return factor_LRR
