"""A small dense classifier: the worked example of most introductions, on three datasets.

Features -> 128 ReLU -> 128 ReLU -> 10 classes by softmax; Adam, categorical cross-entropy, batches
of 32, ten epochs.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.datasets import Digits, FashionMNISTSubset, Synthetic
from bigtrain.data.features import FeatureData
from bigtrain.models.mlp import MLPConfig
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Constant

# Kingma 2014, arXiv:1412.6980: Adam is AdamW without decay, and these are its defaults.
ADAM = AdamW(lr=1e-3, b2=0.999, weight_decay=0.0, clip=None, schedule=Constant(warmup=0))


def base() -> Experiment:
  """100 made-up features, of which a linear model learns nothing."""
  return _study(FeatureData(source=Synthetic()), inputs=100)


def digits() -> Experiment:
  """Handwritten digits of 8x8 pixels, of scikit-learn."""
  return _study(FeatureData(source=Digits()), inputs=64)


def fashion() -> Experiment:
  """Clothes of 28x28 pixels: the part of Fashion-MNIST that is in the package."""
  return _study(FeatureData(source=FashionMNISTSubset()), inputs=784)


def _study(data: FeatureData, inputs: int) -> Experiment:
  return Experiment(
    model=MLPConfig(inputs=inputs, hidden=(128, 128), classes=10, activation="relu"),
    data=data,
    optimizer=ADAM,
    objective=Classification(),
    epochs=10,
    batch=32,
    evaluation=Evaluation(every=500, batch=256),
    checkpoints=Checkpoints(every=500),
  )
