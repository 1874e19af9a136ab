"""Limits of the gradient: by its elements, by the units of a layer, by its global norm."""

import jax
import jax.numpy as jnp
import optax

from bigtrain.optim.layout import Layout, map_layers
from bigtrain.precision import raised


def global_norm(tree) -> jax.Array:
  """The Euclidean norm of all leaves together, in float32 at least."""
  wide = lambda x: x.astype(raised(x.dtype))
  return optax.tree.norm(jax.tree.map(wide, tree))


def by_global_norm(limit: float) -> optax.GradientTransformation:
  """Scales gradients whose global norm is above `limit` down to it."""

  def update(updates, params):
    scale = jnp.minimum(1.0, limit / global_norm(updates))
    return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)

  return optax.stateless(update)


def by_value(limit: float) -> optax.GradientTransformation:
  """Elements beyond `limit` become it, with their sign."""
  return optax.clip(limit)


def by_unit(share: float) -> optax.GradientTransformation:
  """Scales each unit's gradient down to `share` of the norm of its weights (arXiv:2102.06171).

  A unit is a column of a layer's matrix, or a whole vector. Weights count as at least 1e-3, so
  that what starts at zero can leave it.
  """

  def update(updates, params):
    def clipped(layout: Layout, w, u):
      axes = layout.row_axes() or layout.axes(w)
      norm = lambda x: jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
      limit = share * jnp.maximum(norm(w), 1e-3)
      return u * jnp.minimum(1.0, limit / jnp.maximum(norm(u), 1e-6))

    return map_layers(clipped, params, updates)

  return optax.stateless(update)
