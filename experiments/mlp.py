"""A small dense classifier: the worked example of most introductions, on three datasets.

Features -> 128 ReLU -> 128 ReLU -> 10 classes by softmax; Adam, categorical cross-entropy, batches
of 32, ten epochs.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.datasets import Digits, FashionMNISTSubset, Synthetic
from bigtrain.data.features import FeatureData
from bigtrain.models.mlp import MLPConfig
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adam import Adam
from bigtrain.optim.schedule import Constant


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
    optimizer=Adam(lr=1e-3, clip=None, schedule=Constant()),  # The paper's (arXiv:1412.6980).
    objective=Classification(),
    epochs=10,
    batch=32,
    evaluation=Evaluation(every=500, batch=256),
    checkpoints=Checkpoints(every=500),
  )
