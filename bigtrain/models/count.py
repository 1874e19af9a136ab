"""How many parameters a model has, by tracing alone."""

import jax
from flax import nnx

from bigtrain.experiment import ModelConfig
from bigtrain.models.moe import MoE
from bigtrain.state import partition


def count_parameters(c: ModelConfig) -> int:
  """Elements of all parameters of the model, a tied table once. Allocates no parameter."""
  return _size(jax.eval_shape(lambda: c.make(jax.random.key(0))))


def count_active(c: ModelConfig) -> int:
  """Elements of the parameters that one token meets: of experts those that it chooses."""
  model = jax.eval_shape(lambda: c.make(jax.random.key(0)))
  idle = 0
  for _, layer in nnx.iter_modules(model):
    if isinstance(layer, MoE):
      of_experts = sum(w.size for w in (layer.up_EDF, layer.gate_EDF, layer.down_EFD))
      idle += of_experts // layer.c.experts * (layer.c.experts - layer.c.top_k)
  return _size(model) - idle


def _size(model) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(partition(model)[0]))
