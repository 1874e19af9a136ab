"""Newton-Schulz by Gram matrices does to singular values what its polynomial says, in float32.

Dims: L layers, R rows, C columns.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.optim.muon import newton_schulz


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)], ids=str)
@pytest.mark.parametrize("iterations", [1, 5, 7])
@pytest.mark.parametrize("smallest", [1e-1, 1e-8])
def test_every_singular_value_goes_through_the_polynomial(shape, iterations, smallest):
  r = np.random.default_rng(0)
  n = min(shape)
  left_LRN, right_LCN = (np.linalg.qr(r.normal(size=(2, side, n)))[0] for side in shape)
  values_N = np.geomspace(1, smallest, n)
  x_LRC = 3 * (left_LRN * values_N) @ right_LCN.swapaxes(1, 2)
  values_N /= np.linalg.norm(values_N)
  for _ in range(iterations):
    values_N = 3.4445 * values_N - 4.7750 * values_N**3 + 2.0315 * values_N**5
  expected_LRC = (left_LRN * values_N) @ right_LCN.swapaxes(1, 2)
  found_LRC = newton_schulz(jnp.asarray(x_LRC, jnp.float32), iterations)
  np.testing.assert_allclose(found_LRC, expected_LRC, atol=1e-3)
