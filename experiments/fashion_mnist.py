"""A small vision transformer on clothes of 28x28 grey pixels, for two CPU cores.

`base` takes the part of Fashion-MNIST that is in the package; `whole` wants all of it, which
`bigtrain data fetch fashion_mnist` gets.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.augment import HorizontalFlip
from bigtrain.data.datasets import FashionMNIST, FashionMNISTSubset
from bigtrain.data.vision import ImageData
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Normal
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import ViTConfig
from bigtrain.objectives.classification import Classification
from bigtrain.optim.muon import Muon
from bigtrain.optim.schedule import Linear


def base() -> Experiment:
  """The 4,500 images in the package."""
  block = BlockConfig(
    attention=AttentionConfig(heads=4, causal=False),
    feed_forward=FeedForwardConfig(hidden=512, activation="gelu_tanh"),
  )
  return Experiment(
    model=ViTConfig(
      image=28,
      channels=1,
      patch=7,
      classes=10,
      pool="mean",
      dim=128,
      layers=6,
      pattern=(block,),
      norm=RMSNormConfig(),
      init=Normal(std=0.02, residual="zero"),
      remat="none",
      unroll=6,
    ),
    data=ImageData(
      source=FashionMNISTSubset(),
      size=28,
      channels=1,
      augment=(HorizontalFlip(),),
      mean=(0.286,),
      std=(0.353,),
    ),
    optimizer=Muon(
      lr=5e-3,
      adam_lr=1e-3,
      weight_decay=0.05,
      spared="patch|position|head",
      schedule=Linear(warmup=100),
    ),
    objective=Classification(label_smoothing=0.1),
    epochs=30,
    batch=128,
    evaluation=Evaluation(every=200, batch=256),
    checkpoints=Checkpoints(every=200),
  )


def whole() -> Experiment:
  """All 60,000 images: 91% of the test set after ten epochs."""
  e = base()
  e.data.source = FashionMNIST()
  e.epochs = 10
  e.evaluation.every = e.checkpoints.every = 500
  return e
