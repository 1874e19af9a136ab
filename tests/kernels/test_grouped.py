"""Grouped products equal a loop over the groups, forward and backward.

Dims: R row, D model, F hidden, E expert.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.kernels import grouped

R, D, F, E = 300, 5, 7, 4
SIZES = {
  "of every size": [130, 0, 3, 150],
  "all in one": [0, 0, 300, 0],
  "none at all": [0, 0, 0, 0],
  "full": [128, 128, 44, 0],
}
FORMS = {
  "ragged_dot": jax.lax.ragged_dot,
  "blocked": grouped.blocked,
  "reference": grouped.reference,
}


def arrays():
  r = np.random.default_rng(0)
  return r.normal(size=(R, D)), r.normal(size=(E, D, F)), r.normal(size=(R, F))


def loop(x, w, dy, sizes):
  """The product and both gradients in float64, group by group."""
  y, dx, dw, start = np.zeros((R, F)), np.zeros((R, D)), np.zeros((E, D, F)), 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    start += size
  return y, dx, dw


@jax.jit
def run(x, w, dy, sizes):
  """By form: the product and both gradients."""

  def one(form):
    y, back = jax.vjp(lambda x, w: form(x, w, sizes), x, w)
    return (y, *back(dy))

  return {name: one(form) for name, form in FORMS.items()}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_form_equals_a_loop_over_the_groups(sizes):
  x, w, dy = arrays()
  dy[sum(sizes) :] = 0  # What becomes of the rows behind is not defined.
  wanted = loop(x, w, dy, sizes)
  found = run(*(jnp.float32(a) for a in (x, w, dy)), jnp.int32(sizes))
  for name, (y, dx, dw) in found.items():
    got = y[: sum(sizes)], dx[: sum(sizes)], dw
    for a, b in zip(
      got, (wanted[0][: sum(sizes)], wanted[1][: sum(sizes)], wanted[2]), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)


def test_what_lies_behind_the_groups_changes_nothing():
  x, w, dy = arrays()
  x[170:], dy[170:] = np.nan, np.nan
  found = run(*(jnp.float32(a) for a in (x, w, dy)), jnp.int32([100, 50, 0, 20]))
  y, dx, dw = found["blocked"]
  assert all(np.isfinite(a).all() for a in (y[:170], dx[:170], dw))
