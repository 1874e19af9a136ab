"""How many parameters a model has, by tracing alone."""

import jax

from bigtrain.experiment import ModelConfig


def count_parameters(c: ModelConfig) -> int:
  """Elements of all parameters of the model, a tied table once. Allocates no parameter."""
  model = jax.eval_shape(lambda: c.make(jax.random.key(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(model))
