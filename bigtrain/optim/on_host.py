"""Optimizer state in the memory of the host, which has more of it than a chip."""

import jax
import optax

HOST = "pinned_host"  # Its memory's name, in shardings.


def on_host(
  transformation: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """The same updates, with a state that waits in the host's memory between them.

  Each array comes to the chip when its part of the update begins, and goes back behind it.
  """

  def init(params):
    return _moved(transformation.init(params), jax.memory.Space.Host)

  def update(updates, state, params=None, **extra):
    updates, state = transformation.update(updates, on_device(state), params, **extra)
    return updates, _moved(state, jax.memory.Space.Host)

  return optax.GradientTransformationExtraArgs(init, update)


def on_device(state):
  """Arrays of such a state, or of any, where they can be computed with."""
  return _moved(state, jax.memory.Space.Device)


def is_sent(x) -> bool:
  """Whether an array of the state is one that waits there; single numbers, such as counts, stay."""
  return x.ndim > 0


def _moved(state, space):
  return jax.tree.map(lambda x: jax.device_put(x, space) if is_sent(x) else x, state)
