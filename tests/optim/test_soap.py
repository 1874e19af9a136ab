"""What SOAP's state owes to rounding: nothing that a mesh could change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.optim.soap import SOAP, scale_by_soap, signed

MATRICES, ROWS, COLUMNS = 80, 16, 32


@pytest.fixture(scope="module")
def bases():
  """Those of the rows after each of two updates, (MATRICES, ROWS, ROWS): of gradients, and of the
  same gradients moved in their last bit. The first is of eigh, the second of a QR."""
  r = np.random.default_rng(0)
  tx = scale_by_soap(SOAP(lr=0.1, every=2))
  given = [np.float32(r.normal(size=(MATRICES, ROWS, COLUMNS))) for _ in range(2)]
  eps = np.finfo(np.float32).eps
  near = [np.float32(g * (1 + eps * r.integers(-1, 2, g.shape))) for g in given]

  @jax.jit
  def run(*gradients):
    state, found = tx.init({"up_EDF": gradients[0]}), []
    for g in gradients:
      _, state = tx.update({"up_EDF": g}, state)
      found.append(state.sides["up_EDF"][0].basis.reshape(MATRICES, ROWS, ROWS))
    return found

  return list(zip(run(*given), run(*near), strict=True))


@pytest.mark.parametrize("update", [0, 1], ids=["eigh", "qr"])
def test_a_last_bit_turns_no_vector_round(update, bases):
  one, other = map(np.asarray, bases[update])
  cosines = (one * other).sum(1)  # Of each vector with itself.
  known = np.abs(cosines) > 0.9  # Eigenvalues that are nearly equal leave their vectors open.
  assert known.mean() > 0.99 and (cosines[known] > 0).all()


def test_a_sign_follows_from_the_vector_also_where_its_entries_cancel():
  r = np.random.default_rng(1)
  basis = np.linalg.qr(r.normal(size=(3, 8, 8)))[0]
  basis[0] = np.kron(np.eye(4), [[1, 1], [1, -1]]) / 2**0.5  # Pairs of equal size.
  basis = basis.astype(np.float32)
  turned = basis * r.choice([-1, 1], (3, 1, 8)).astype(np.float32)
  moved = turned * (1 + np.finfo(np.float32).eps * r.integers(-1, 2, turned.shape))
  found = np.asarray(signed(jnp.asarray(basis)))
  np.testing.assert_array_equal(np.abs(found), np.abs(basis))
  np.testing.assert_allclose(signed(jnp.asarray(moved, np.float32)), found, atol=1e-6)
