"""Models of any width, with and without muP.

Dims: B batch, T position, V vocabulary.
"""

import dataclasses

import numpy as np

from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import FanIn, Mup
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import ViTConfig

V, T, BASE, HEAD = 32, 8, 64, 32
AT_BASE = FanIn(residual="scaled")


def blocks(dim, head_dim=None, hidden=None, **attention):
  """Two heads that grow, or, of a given width, as many as the model's dim asks for."""
  heads = 2 if head_dim is None else dim // head_dim
  heads = AttentionConfig(heads=heads, head_dim=head_dim, **attention)
  return {
    "dim": dim,
    "layers": 2,
    "pattern": (
      BlockConfig(attention=heads, feed_forward=FeedForwardConfig(hidden=hidden or 2 * dim)),
    ),
    "remat": "none",
  }


def mup(**fields):
  return Mup(base=BASE, head_dim=HEAD, at_base=AT_BASE, **fields)


def decoder(dim, init, head_dim=None, hidden=None, **fields):
  return LanguageModelConfig(vocab=V, init=init, **blocks(dim, head_dim, hidden), **fields)


def untied(dim, init):
  return decoder(dim, init, head_dim=HEAD, tied=False)


def vit(dim, init):
  of = blocks(dim, causal=False)
  return ViTConfig(image=8, channels=1, patch=4, classes=V, pool="map", init=init, **of)


def dense(dim, init):
  init = dataclasses.replace(init, head_dim=None) if isinstance(init, Mup) else init
  return MLPConfig(inputs=T, hidden=(dim, dim), classes=V, init=init)


def inputs(c, rows=4):
  r = np.random.default_rng(0)
  if isinstance(c, LanguageModelConfig):
    return r.integers(0, V, (rows, T))
  return r.normal(size=(rows, T) if isinstance(c, MLPConfig) else (rows, 8, 8, 1)).astype("float32")
