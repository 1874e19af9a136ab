"""The smallest language model with all that a run depends on; it compiles in a moment.

Dims: B batch, T position, D model, V vocabulary.
"""

import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding
from bigtrain.config import config
from bigtrain.dropout import dropout
from bigtrain.experiment import ModelConfig
from bigtrain.models.initial import Initializer, Normal
from bigtrain.models.position import lookup


@config
class Bigram(ModelConfig):
  """A table from each token to the next one's logits, of low rank."""

  vocab: int = 384
  dim: int = 32
  dropout: float = 0.1

  def make(self, key):
    return BigramModel(self, key)

  def dims(self):
    return {"vocab": ("V", self.vocab), "dim": ("D", self.dim)}

  def vocabulary(self):
    return self.vocab


class BigramModel(nnx.Module):
  continues = True  # As a decoder does, its prompt.

  def __init__(self, c: Bigram, key):
    self.c = c
    sizes = {"V": c.vocab, "D": c.dim}
    self.embed_VD = Initializer(Normal(), 1).weight(key, "VD", sizes, fan_in="D")

  def hidden(self, tokens_BT, positions_BT=None, segments_BT=None, key=None):
    x_BTD = lookup(self.embed_VD, tokens_BT, jnp.float32)
    return dropout(x_BTD, self.c.dropout, key)

  def output_VD(self, x_BTD):
    return sharding.use(self.embed_VD, "VD", over=sharding.split_over(x_BTD, 2))

  def __call__(self, tokens_BT):
    x_BTD = self.hidden(tokens_BT)
    return jnp.einsum("btd,vd->btv", x_BTD, self.output_VD(x_BTD))
