"""SOAP: Adam in the eigenbasis of Shampoo's statistics; all else by Adam."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import P

from bigtrain.config import Refused, config
from bigtrain.optim.adam import check_decay, check_positive
from bigtrain.optim.layout import TABLES, Layout, layout, map_layers, matrices_by, spread
from bigtrain.optim.optimizer import Factor, Optimizer, check_pattern
from bigtrain.width import Width


@config
class SOAP(Optimizer):
  """Vyas 2024, arXiv:2409.11321, algorithm 3; the first basis is of the first gradient.

  A matrix is all rows by all columns of one layer (layout.py).
  """

  b1: float = 0.95  # Decay of the mean of the gradient.
  b2: float = 0.95  # Decay of the mean of its square, and of the statistics of rows and columns.
  eps: float = 1e-8  # Added to the root of the mean square.
  every: int = 10  # Updates between two refinements of the eigenvectors.
  largest: int = 10_000  # Sides of a matrix that are longer keep their own basis.
  # Regular expression of matrices that Adam has: look-up tables, and what inputs and outputs meet.
  spared: str | None = TABLES

  def direction(self) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
    return matrices_by(scale_by_soap(self), adam, self.spared)

  def width_rule(self, width: Width) -> Factor:
    raise Refused(
      "optimizer: SOAP has no rule for Mup: its updates lie between Adam's and Muon's, as the rank "
      "of the gradient has it; take AdamW or Muon"
    )

  def check(self) -> None:
    Optimizer.check(self)
    check_pattern("spared", self.spared)
    check_decay(b1=self.b1, b2=self.b2)
    check_positive(eps=self.eps)
    for name in ("every", "largest"):
      if getattr(self, name) < 1:
        raise Refused(f"{name} is {getattr(self, name)}; it is at least 1")


class Side(NamedTuple):
  """What is known of the rows, or of the columns, of a parameter's matrices."""

  statistic: jax.Array  # Decayed mean of G G' (or G' G), (L, N, N); of experts (L, E, N, N).
  basis: jax.Array  # Its eigenvectors, nearly, as columns.


class Soap(NamedTuple):
  """The state of `scale_by_soap`."""

  count: jax.Array  # Updates seen.
  mean: Any  # Of the gradient.
  square: Any  # Mean of the squared gradient in the basis, shaped like the parameter.
  sides: Any  # For each parameter a pair of Sides; None for one that keeps its own basis.


def scale_by_soap(c: SOAP) -> optax.GradientTransformation:
  """Adam's direction, of matrices turned into their eigenbasis and back."""

  def init(params) -> Soap:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    sides = map_layers(lambda at, w: _sides(at, w, c.largest), params)
    return Soap(jnp.zeros((), jnp.int32), zeros(), zeros(), sides)

  def update(updates, state: Any, params=None):
    count = state.count + 1
    mean = jax.tree.map(lambda m, g: c.b1 * m + (1 - c.b1) * g, state.mean, updates)
    paths, structure = jax.tree.flatten_with_path(updates)
    columns = [structure.flatten_up_to(tree) for tree in (mean, state.square, state.sides)]
    results = [
      _turned(c, layout(path, g), count, g, *rest)
      for (path, g), *rest in zip(paths, *columns, strict=True)
    ]
    directions, square, sides = (structure.unflatten(r[i] for r in results) for i in range(3))
    return directions, Soap(count, mean, square, sides)

  return optax.GradientTransformation(init, update)


def _sides(at: Layout, w, largest: int) -> tuple[Side | None, Side | None]:
  """Both sides before the first update. They are sharded as the parameter's side is."""
  spec = jax.typeof(w).sharding.spec if not jax.sharding.get_abstract_mesh().empty else None
  layers = w.shape[: at.stack] or (1,)

  def side(axes: tuple[int, ...], size: int) -> Side | None:
    if size > largest:
      return None
    place = None if spec is None else P(*(spec[: at.stack] or (None,)), spec[axes[0]], None)
    zeros = lambda: jnp.zeros((*layers, size, size), w.dtype, out_sharding=place)
    return Side(zeros(), zeros())

  rows, columns = at.sides(w)
  return side(at.row_axes(), rows), side(at.column_axes(w), columns)


def _turned(c: SOAP, at: Layout, count, g, mean, square, sides):
  """(direction, square, sides) of one parameter."""
  leaves, structure = jax.tree.flatten(sides)
  stacks = [x if at.stack else x[None] for x in (g, mean, square)]
  counts = jnp.broadcast_to(count, len(stacks[0]))

  def local(counts, g, mean, square, *leaves):
    matrix = lambda x: x.reshape(-1, *at.sides(x[0] if not at.stack else x))
    count, shape = counts[0], g.shape
    g, mean, square = map(matrix, (g, mean, square))
    sides = structure.unflatten(x.reshape(-1, *x.shape[-2:]) for x in leaves)
    direction, square, sides = _step(c, count, g, mean, square, sides)
    back = (x.reshape(old.shape) for x, old in zip(jax.tree.leaves(sides), leaves, strict=True))
    return direction.reshape(shape), square.reshape(shape), *back

  like = (stacks[0], stacks[2], *leaves)
  direction, square, *leaves = spread(local, like, counts, *stacks, *leaves)
  unstack = lambda x: x if at.stack else x[0]
  return unstack(direction), unstack(square), structure.unflatten(leaves)


def _step(c: SOAP, count, g_LRC, mean_LRC, square_LRC, sides):
  """One step of algorithm 3, for the matrices of one device."""
  grams = (g_LRC @ _t(g_LRC), _t(g_LRC) @ g_LRC)

  def begun(side: Side | None, gram):
    if side is None:
      return None
    eigenvectors = lambda: signed(jnp.linalg.eigh(gram)[1])
    return side._replace(basis=jax.lax.cond(count == 1, eigenvectors, lambda: side.basis))

  def followed(side: Side | None, gram):
    if side is None:
      return None
    statistic = c.b2 * side.statistic + (1 - c.b2) * gram
    refined = lambda: signed(jnp.linalg.qr(statistic @ side.basis)[0])
    return Side(statistic, jax.lax.cond(count % c.every == 0, refined, lambda: side.basis))

  rows, columns = map(begun, sides, grams)
  left = lambda x: x if rows is None else _t(rows.basis) @ x
  right = lambda x: x if columns is None else x @ columns.basis
  square_LRC = c.b2 * square_LRC + (1 - c.b2) * right(left(g_LRC)) ** 2
  corrected = right(left(mean_LRC)) / (1 - c.b1**count)
  y_LRC = corrected / (jnp.sqrt(square_LRC / (1 - c.b2**count)) + c.eps)
  y_LRC = y_LRC if rows is None else rows.basis @ y_LRC
  y_LRC = y_LRC if columns is None else y_LRC @ _t(columns.basis)
  return y_LRC, square_LRC, tuple(map(followed, (rows, columns), grams))


def signed(basis_LNN) -> jax.Array:
  """Vectors, as columns, of the one of both signs by which a sum of theirs is positive.

  Decompositions leave the sign to rounding, and updates do not depend on it; so that a state is the
  same on any mesh, it follows from the vector. The weights of the sum have no pattern that a vector
  could cancel, as pairs of equal entries would a plain sum or a largest entry.
  """
  weights_N1 = jnp.sin(jnp.arange(1.0, basis_LNN.shape[-2] + 1, dtype=basis_LNN.dtype))[:, None]
  return jnp.where((basis_LNN * weights_N1).sum(-2, keepdims=True) < 0, -basis_LNN, basis_LNN)


def _t(x_LRC):
  return jnp.swapaxes(x_LRC, 1, 2)
