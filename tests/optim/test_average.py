import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigtrain.optim.average import averaged, track_average


def run(decay, updates, start):
  tx = optax.chain(optax.identity(), track_average(decay))

  @jax.jit
  def step(w, state, u):
    out, state = tx.update(u, state, w)
    return optax.apply_updates(w, out), state

  w, state = {"w": jnp.asarray(start)}, None
  state = tx.init(w)
  for u in updates:
    w, state = step(w, state, {"w": jnp.asarray(u)})
  return w, state


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999999])
def test_average_is_the_closed_form_without_a_trace_of_the_initial_weights(decay):
  r = np.random.default_rng(0)
  start, updates = r.normal(size=5).astype(np.float32), r.normal(size=(30, 5)).astype(np.float32)
  w, state = run(decay, updates, start)
  visited = start.astype(np.float64) + np.cumsum(updates.astype(np.float64), 0)
  factors = decay ** np.arange(29, -1, -1.0)
  want = (factors[:, None] * visited).sum(0) / factors.sum()
  np.testing.assert_allclose(averaged(state, w)["w"], want, rtol=2e-6, atol=2e-6)


def test_weights_that_stand_still_are_their_own_average():
  start = np.float32([1 / 3, -7e8, 1e-30])
  w, state = run(0.999, np.zeros((100, 3), np.float32), start)
  np.testing.assert_allclose(averaged(state, w)["w"], start, rtol=1e-6)


def test_updates_pass_through_unchanged():
  updates = np.float32([[1, 2], [3, 4]])
  w, _ = run(0.9, updates, np.zeros(2, np.float32))
  np.testing.assert_array_equal(w["w"], [4, 6])


def test_before_the_first_update_the_average_is_a_copy_of_the_weights():
  w, state = run(0.9, [], np.float32([1, 2]))
  average = averaged(state, w)["w"]
  np.testing.assert_array_equal(average, w["w"])
  assert average is not w["w"]  # Both are donated.


def test_without_an_average_the_model_itself_is_returned():
  w = {"w": jnp.ones(2)}
  assert averaged(optax.adam(0.1).init(w), w) is w
