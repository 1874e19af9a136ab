"""Made-up images with classes, and a tiny experiment on them; no files, no cache.

Dims: B batch, R image row, S image column, C classes.
"""

import dataclasses

import jax
import numpy as np

from bigtrain.config import config
from bigtrain.experiment import Data, DataConfig, Evaluation, Experiment, Logging, ModelConfig
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.norm import LayerNormConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import AttentionPoolConfig, ViTConfig
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine

B, R, S, CHANNELS, C = 16, 8, 8, 2, 7
PIXELS = R * S * CHANNELS
MODELS = {
  "mlp": MLPConfig(
    inputs=PIXELS,
    hidden=(16, 24, 24),
    classes=C,
    activation="prelu",
    norm=LayerNormConfig(),
    residual=True,
    dropout=0.1,
    dtype="float32",
  ),
  "vit": ViTConfig(
    image=R,
    channels=CHANNELS,
    patch=4,
    classes=C,
    pool=AttentionPoolConfig(heads=8, hidden=24, bias=False),
    dim=32,
    layers=2,
    pattern=(
      BlockConfig(
        # Without biases: that of the keys has no gradient but rounding, which Adam would enlarge.
        attention=AttentionConfig(heads=8, causal=False),
        feed_forward=FeedForwardConfig(hidden=40, bias=True),
      ),
    ),
    drop_path=0.3,
    dropout=0.1,
    dtype="float32",
  ),
}


@config
class Blobs(DataConfig):
  """Images of noise around their class's own; one in ten rows has no weight."""

  noise: float = 0.5
  examples: int = 160  # Of training, in an epoch.
  held_out: int = 27

  def make(self, seed: int) -> "BlobData":
    return BlobData(self, seed)


class BlobData(Data):
  def __init__(self, c: Blobs, seed: int):
    self.c, self.seed = c, seed

  def spec(self, size):
    shapes = {"inputs": (R, S, CHANNELS), "labels": (), "weights": ()}
    kinds = {"labels": np.int32}
    return {
      k: jax.ShapeDtypeStruct((size, *shape), kinds.get(k, np.float32))
      for k, shape in shapes.items()
    }

  def batch(self, example, size, rows=None):
    return self._rows(self.seed, (example + np.arange(size))[rows or slice(None)])

  def examples(self):
    return self.c.examples

  def eval_examples(self):
    return self.c.held_out

  def eval_batch(self, example, size, rows=None):
    wanted = (example + np.arange(size))[rows or slice(None)]
    batch = self._rows(2**31, wanted)
    return batch | {"weights": (wanted < self.c.held_out).astype(np.float32)}

  def _rows(self, stream, wanted):
    means_CRSK = np.random.default_rng(0).normal(size=(C, R, S, CHANNELS))
    rows = [np.random.default_rng([stream, int(i)]) for i in wanted]
    labels_B = np.array([r.integers(C) for r in rows], np.int32)
    noise = np.stack([r.normal(size=(R, S, CHANNELS)) for r in rows])
    inputs = means_CRSK[labels_B] + self.c.noise * noise
    weights_B = np.array([r.random() < 0.9 for r in rows], np.float32)
    return {"inputs": inputs.astype(np.float32), "labels": labels_B, "weights": weights_B}


def experiment(model: ModelConfig, **fields) -> Experiment:
  """Five steps with every mixture on; some fields replaced."""
  parts = {
    "data": Blobs(),
    # As in packed.py: a larger eps, so that rounding does not become the update.
    "optimizer": AdamW(lr=1e-2, eps=1e-5, clip=0.5, average=0.9, schedule=Cosine(warmup=2)),
    "objective": Classification(label_smoothing=0.1, mixup=0.4, cutmix=1.0),
    "mesh": Mesh(),
    "evaluation": Evaluation(every=0, batch=16),
    "logging": Logging(every=1, tensorboard=False),
  }
  return Experiment(model=model, **parts | {"steps": 5, "batch": B} | fields)


def calm(model: ModelConfig, **fields) -> Experiment:
  """The same without mixtures and smoothing."""
  return dataclasses.replace(experiment(model, **fields), objective=Classification())
