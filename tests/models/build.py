"""Modules with weights drawn by numpy: compiling jax's random initialisation takes seconds."""

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain.kernels.attention import Tokens


def filled(make, scale=0.3, seed=0):
  """The module of `make(key)` with every parameter, biases and norms too, from a normal."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: make(jax.random.key(0)))
  return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), shapes)


def normal(*shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def row(length, batch=1, segments=None):
  """Tokens of `batch` rows that are one document each, or of packed documents."""
  positions = np.arange(length)
  if segments is not None:
    segments = np.tile(segments, (batch, 1))
    starts = np.flatnonzero(np.diff(segments[0], prepend=-1))
    positions = positions - starts[np.searchsorted(starts, positions, side="right") - 1]
  return Tokens(np.tile(positions, (batch, 1)), segments)
