"""Adafactor: a matrix's mean squares kept as those of its rows and of its columns alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigtrain.config import Refused, config
from bigtrain.optim.adam import check_positive
from bigtrain.optim.layout import Layout, map_layers
from bigtrain.optim.optimizer import Factor, Optimizer
from bigtrain.optim.schedule import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay
from bigtrain.width import Width


@config
class Adafactor(Optimizer):
  """Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5, without momentum.

  optax has it for one matrix a parameter; here each layer of a stack is one, with its own rows and
  columns (layout.py).
  """

  schedule: Constant | Cosine | InverseSqrt | Linear | WarmupStableDecay = InverseSqrt()
  decay: float = 0.8  # Mean squares decay by 1 - t^-decay at update t.
  threshold: float = 1.0  # Largest root mean square of a layer's update.
  eps: float = 1e-30  # Added to squares.
  # The rate is a share of the root mean square of a layer's weights, which counts at least this
  # much; None: it is a plain rate.
  least: float | None = 1e-3

  def direction(self) -> optax.GradientTransformation:
    def shorten(updates, params):
      return map_layers(lambda at, u: u / jnp.maximum(1.0, _rms(at, u) / self.threshold), updates)

    def stretch(updates, params):
      if (least := self.least) is None:
        return updates
      return map_layers(lambda at, w, u: u * jnp.maximum(least, _rms(at, w)), params, updates)

    factors = scale_by_factors(self.decay, self.eps)
    return optax.chain(factors, optax.stateless(shorten), optax.stateless(stretch))

  def width_rule(self, width: Width) -> Factor:
    if self.least is not None:
      raise Refused("optimizer: with Mup, Adafactor's least must be None: rates follow the weights")
    return lambda path, w: width.of_signs(path)

  def check(self) -> None:
    Optimizer.check(self)
    check_positive(decay=self.decay, threshold=self.threshold, eps=self.eps)
    if self.moments != "float32":
      raise Refused(
        f"moments is {self.moments}, but Adafactor keeps one number for each row and column; set "
        "moments to float32"
      )
    if self.least is not None:
      check_positive(least=self.least)


class Factors(NamedTuple):
  """Mean squares of the gradient: of rows and columns of matrices, of each element of vectors."""

  count: jax.Array  # Updates seen.
  rows: Any  # A matrix's mean over its columns; a vector's elements.
  columns: Any  # A matrix's mean over its rows; of a vector, one unused number for each layer.


def scale_by_factors(decay: float, eps: float) -> optax.GradientTransformation:
  """The gradient over the root of (rows x columns / mean of rows)."""

  def means(layout: Layout, x):
    if not layout.rows:
      return x, jnp.zeros(x.shape[: layout.stack], x.dtype)
    mean = lambda axes: jnp.mean(x, axes, keepdims=True)
    return mean(layout.column_axes(x)), mean(layout.row_axes())

  def init(params) -> Factors:
    zeros = lambda i: map_layers(lambda at, w: jnp.zeros_like(means(at, w)[i]), params)
    return Factors(jnp.zeros((), jnp.int32), zeros(0), zeros(1))

  def update(updates, state: Any, params=None):
    count = state.count + 1
    beta = 1 - count.astype(float) ** -decay
    square = lambda u: u**2 + eps

    def follow(i, old):
      mix = lambda at, u, v: (beta * v + (1 - beta) * means(at, square(u))[i]).astype(v.dtype)
      return map_layers(mix, updates, old)

    def scaled(layout: Layout, u, rows, columns):
      if not layout.rows:
        return u * jax.lax.rsqrt(rows)
      mean = jnp.mean(rows, layout.row_axes(), keepdims=True)
      return u * jax.lax.rsqrt(rows / mean) * jax.lax.rsqrt(columns)

    rows, columns = follow(0, state.rows), follow(1, state.columns)
    return map_layers(scaled, updates, rows, columns), Factors(count, rows, columns)

  return optax.GradientTransformation(init, update)


def _rms(layout: Layout, x) -> jax.Array:
  return jnp.sqrt(jnp.mean(x**2, layout.axes(x), keepdims=True))
