"""Thirty layers of sigmoids learn nothing: why, and four cures, each of which is one change.

Back through a layer, a gradient is multiplied by the slope of its activation and by its weights. A
sigmoid's slope is at most 1/4, so with weights that keep the variance of what they multiply, thirty
layers leave 1e-20 of the gradient for the first one. `bigtrain diagnose` says so; the figures and a
picture are in docs/vanishing_gradients.md.
"""

from bigtrain import Checkpoints, Evaluation, Experiment, Logging
from bigtrain.data.datasets import Digits
from bigtrain.data.features import FeatureData
from bigtrain.models.initial import FanIn
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.norm import LayerNormConfig
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adam import Adam
from bigtrain.optim.schedule import Linear

DEPTH, WIDTH = 30, 64  # Hidden layers, as wide as the digits have pixels.


def base() -> Experiment:
  """Sigmoids, initialised as well as sigmoids can be: it does not learn."""
  # Variance 2 / (fan_in + fan_out), which is 1 / fan_in between equal widths (Glorot and Bengio
  # 2010, proceedings.mlr.press/v9/glorot10a.html). It is made for a slope of 1 at zero.
  return _study(MLPConfig(activation="sigmoid", init=FanIn(scale=1.0), **_sizes()))


def leaky_relu() -> Experiment:
  """Does a slope of 1 for half of the inputs, and 0.01 for the others, let thirty layers learn?"""
  # Twice the variance makes up for the half that is lost (He et al. 2015, arXiv:1502.01852).
  return _study(MLPConfig(activation="leaky_relu", init=FanIn(scale=2.0), **_sizes()))


def prelu() -> Experiment:
  """The same with a slope that is learned, from 0.25 on."""
  # He et al. 2015, equation 15: 2 / (1 + slope ** 2).
  init = FanIn(scale=2 / (1 + 0.25**2))
  return _study(MLPConfig(activation="prelu", init=init, **_sizes()))


def residual() -> Experiment:
  """Sigmoids still, but each layer adds to the one before: the gradient also passes it by."""
  e = base()
  e.model.residual = True
  return e


def normalised() -> Experiment:
  """The same, with each layer's sums normalised before the sigmoid."""
  e = residual()
  e.model.norm = LayerNormConfig()
  return e


def _sizes() -> dict:
  return {"inputs": 64, "hidden": (WIDTH,) * DEPTH, "classes": 10}


def _study(model: MLPConfig) -> Experiment[MLPConfig, FeatureData, Adam, Classification]:
  """Adam: small gradients make as large updates as large ones, unless they are below its eps."""
  return Experiment(
    model=model,
    data=FeatureData(source=Digits()),
    optimizer=Adam(lr=1e-3, clip=None, schedule=Linear(warmup=0)),
    objective=Classification(),
    epochs=20,
    batch=64,
    evaluation=Evaluation(every=50, batch=64),
    checkpoints=Checkpoints(every=500),
    logging=Logging(layers_every=50),
  )
