"""Configurations that are sick in a known way, and healthy ones, to judge `bigtrain diagnose` by.

Written down with what is expected of each before any was run; no threshold was set by them. Each
trains for seconds on two CPU cores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from sick_parts import CNN, Few, Planted, Slow, experiment, loaded, mlp, short

from bigtrain import Experiment
from bigtrain.data.datasets import Digits, FashionMNISTSubset
from bigtrain.data.features import FeatureData
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import Bytes
from bigtrain.data.vision import ImageData
from bigtrain.interop.nnx_module import WithNNXModule
from bigtrain.models import presets
from bigtrain.models.initial import FanIn, Normal
from bigtrain.models.position import Learned
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.lion import Lion
from bigtrain.optim.muon import Muon
from bigtrain.optim.schedule import Constant, Linear
from bigtrain.optim.sgd import SGD
from bigtrain.optim.soap import SOAP

DIGITS, FASHION = FeatureData(source=Digits()), FeatureData(source=FashionMNISTSubset())
GREY = ImageData(source=FashionMNISTSubset(), size=28, channels=1)


class Case(NamedTuple):
  """A configuration and what a diagnosis should say of it."""

  make: Callable[[], Experiment]
  expected: str | None = None  # The kind of finding; None for a healthy configuration.
  also: tuple[str, ...] = ()  # What is true of it besides, so that it is no false alarm.


# What every rate that is far too high may bring about.
WILD = ("divergence", "loss spikes", "dead units", "saturated units", "attention collapse")


def first() -> dict[str, Case]:
  """The first set."""
  too_high = ("learning rate too high", *WILD)
  return {
    "24 layers of tanh, small weights": Case(deep_tanh, "vanishing gradients"),
    "20 layers of relu, large weights": Case(deep_relu, "exploding gradients", too_high),
    "relu at 300 times Adam's rate": Case(dead_relu, "dead units", too_high),
    "decoder at 300 times its rate": Case(wild_decoder, "learning rate too high", WILD),
    "BERT at a hundred-thousandth of its rate": Case(slow_bert, "learning rate too low"),
    "ViT on 200 images": Case(few_images, "over-fitting"),
    "convolutions on a slow source": Case(slow_source, "input-bound"),
    "decoder whose batch grows at each step": Case(growing_batch, "compile-bound"),
    "decoder on one short row": Case(one_row, "chip not filled"),
    "decoder with large query and key weights": Case(large_scores, "attention collapse", too_high),
    "decoder with three batches of noise": Case(planted_text, "loss spikes"),
    "quickstart": Case(quickstart),
    "mlp": Case(lambda: short(loaded("mlp.py"))),
    "mlp:digits": Case(lambda: short(loaded("mlp.py:digits"))),
    "mlp:fashion": Case(lambda: short(loaded("mlp.py:fashion"))),
    "bert:small": Case(bert),
    "vit, tiny": Case(vit),
    "gpt2, tiny": Case(gpt2),
    "quickstart with Muon": Case(muon),
    "mlp:digits with SGD, batch 256": Case(digits_sgd),
    "convolutions and BatchNorm": Case(convolutions),
  }


def second() -> dict[str, Case]:
  """The second set, made when checks had been improved after a look at the first one's findings."""
  too_high = ("learning rate too high", *WILD)
  return {
    "16 layers of sigmoid, SGD": Case(deep_sigmoid, "vanishing gradients"),
    "24 layers of leaky_relu, large weights": Case(deep_leaky, "exploding gradients", too_high),
    "relu, Lion at 200 times its rate": Case(dead_lion, "dead units", too_high),
    "tanh, large weights": Case(large_tanh, "saturated units"),
    "ViT at 100 times its rate": Case(wild_vit, "learning rate too high", WILD),
    "relu, SGD at a rate of 1000": Case(diverging, "divergence", too_high),
    "convolutions at a millionth of their rate": Case(slow_convolutions, "learning rate too low"),
    "mlp on 300 examples": Case(few_features, "over-fitting"),
    "decoder of bytes on a slow source": Case(slow_bytes, "input-bound"),
    "ViT on one image": Case(one_image, "chip not filled"),
    "BERT with large weights": Case(large_bert, "attention collapse", too_high),
    "mlp with three batches of noise": Case(planted_features, "loss spikes"),
    "vanishing_gradients:leaky_relu": Case(lambda: thirty("leaky_relu")),
    "vanishing_gradients:normalised": Case(lambda: thirty("normalised")),
    "mlp:digits with Lion": Case(digits_lion),
    "mlp:fashion, batch 8": Case(fashion_8),
    "mlp:digits, tanh": Case(digits_tanh),
    "decoder of bytes": Case(byte_decoder),
    "decoder of bytes, Adafactor": Case(adafactor),
    "decoder of bytes, batch 2": Case(lambda: short(byte_decoder(), 300, 2)),
    "decoder of bytes, gated, SOAP": Case(gated),
    "ViT, mean of patches, Lion": Case(vit_lion),
    "bert:small_next_sentence": Case(pairs),
    "convolutions, AdamW": Case(convolutions_adamw),
  }


# Sick.


def deep_tanh() -> Experiment:
  return mlp(
    DIGITS, AdamW(lr=1e-3, schedule=Constant()), 24, activation="tanh", init=FanIn(scale=0.25)
  )


def deep_relu() -> Experiment:
  return mlp(DIGITS, SGD(lr=1e-4, schedule=Constant()), 20, init=FanIn(scale=8.0))


def dead_relu() -> Experiment:
  return mlp(FASHION, AdamW(lr=0.3, schedule=Constant(), weight_decay=0.0, clip=None), 3)


def wild_decoder() -> Experiment:
  e = quickstart()
  e.optimizer.lr *= 300
  return e


def slow_bert() -> Experiment:
  e = bert()
  e.optimizer.lr *= 1e-5
  return e


def few_images() -> Experiment:
  e = vit()
  e.data.source = Few(examples=200)
  return e


def slow_source() -> Experiment:
  e = convolutions()
  e.data = Slow(data=e.data, seconds=0.2)
  return short(e, 60, 32)


def growing_batch() -> Experiment:
  e = quickstart()
  e.batch_stages = tuple((i, 8 + i) for i in range(1, 15))
  return short(e, 15, 8)


def one_row() -> Experiment:
  e = quickstart()
  e.data.seq = 16
  return short(e, 200, 1)


def large_scores() -> Experiment:
  e = gpt2()
  e.model.init = Normal(std=0.5)
  return e


def planted_text() -> Experiment:
  e = quickstart()
  e.data = Planted(data=e.data, batches=(113, 147, 171), batch=e.batch)
  return e


def deep_sigmoid() -> Experiment:
  return mlp(FASHION, SGD(lr=0.1, schedule=Constant()), 16, activation="sigmoid", init=FanIn())


def deep_leaky() -> Experiment:
  fields = {"activation": "leaky_relu", "init": FanIn(scale=10.0)}
  return mlp(FASHION, AdamW(lr=1e-3, schedule=Constant()), 24, **fields)


def dead_lion() -> Experiment:
  return mlp(DIGITS, Lion(lr=0.02, schedule=Constant()), 4)


def large_tanh() -> Experiment:
  fields = {"activation": "tanh", "init": FanIn(scale=100.0)}
  return mlp(DIGITS, AdamW(lr=1e-3, schedule=Constant()), 4, **fields)


def wild_vit() -> Experiment:
  e = vit()
  e.optimizer.lr *= 100
  return e


def diverging() -> Experiment:
  return mlp(FASHION, SGD(lr=1000.0, schedule=Constant(), clip=None), 2)


def slow_convolutions() -> Experiment:
  e = convolutions()
  e.optimizer.lr *= 1e-6
  return e


def few_features() -> Experiment:
  e = loaded("mlp.py")
  e.data.source.examples, e.epochs = 300, None
  return short(e, 600, 32)


def slow_bytes() -> Experiment:
  e = byte_decoder()
  e.data = Slow(data=e.data, seconds=0.3)
  return short(e, 60, 8)


def one_image() -> Experiment:
  return short(vit(), 300, 1)


def large_bert() -> Experiment:
  e = bert()
  e.model.encoder.init = Normal(std=1.0, residual="same")
  return e


def planted_features() -> Experiment:
  e = loaded("mlp.py:fashion")
  e.data, e.epochs = Planted(data=e.data, batches=(151, 233, 317), batch=32), None
  return short(e, 500, 32)


# Healthy.


def thirty(name: str) -> Experiment:
  return short(loaded(f"vanishing_gradients.py:{name}"))


def digits_lion() -> Experiment:
  e = loaded("mlp.py:digits")
  e.optimizer, e.epochs = Lion(lr=1e-4, schedule=Constant()), None
  return short(e, 500, 32)


def fashion_8() -> Experiment:
  e = loaded("mlp.py:fashion")
  e.epochs = None
  return short(e, 1000, 8)


def digits_tanh() -> Experiment:
  e = loaded("mlp.py:digits")
  e.model.activation, e.model.init, e.epochs = "tanh", FanIn(), None
  return short(e, 400, 32)


def byte_decoder() -> Experiment[Any, Any, Any, Any]:
  e = quickstart()
  e.data, e.model.vocab = TextData(tokenizer=Bytes(), seq=128), 384
  e.model.dim, e.model.layers, e.model.pattern[0].feed_forward.hidden = 64, 2, 256
  return e


def adafactor() -> Experiment:
  e = byte_decoder()
  e.optimizer = Adafactor(lr=1e-2, schedule=Linear(warmup=20))
  return e


def gated() -> Experiment:
  e = byte_decoder()
  e.model.pattern[0].feed_forward.activation, e.model.pattern[0].feed_forward.gated = "silu", True
  e.optimizer = SOAP(lr=3e-3, schedule=Linear(warmup=20))
  return e


def vit_lion() -> Experiment:
  e = vit()
  e.model.pool, e.model.position = "mean", "sincos"
  e.optimizer = Lion(lr=2e-4, weight_decay=0.1, schedule=Linear(warmup=20))
  return e


def pairs() -> Experiment:
  e = loaded("bert.py:small_next_sentence")
  e.optimizer.schedule.warmup = 20
  return short(e, 200, 8)


def convolutions_adamw() -> Experiment:
  e = convolutions()
  e.optimizer = AdamW(lr=1e-3, schedule=Linear(warmup=20))
  return short(e, 300, 16)


def quickstart() -> Experiment[Any, Any, Any, Any]:
  e = loaded("quickstart.py")
  e.optimizer.schedule.warmup = 20
  return short(e, 200, 8)


def muon() -> Experiment:
  e = quickstart()
  e.optimizer = Muon(lr=0.02, schedule=Linear(warmup=20))
  return e


def gpt2() -> Experiment[Any, Any, Any, Any]:
  e, model = quickstart(), presets.gpt2("124m")
  model.vocab, model.dim, model.layers, model.remat = 2048, 64, 4, "none"
  model.position = Learned(length=128)
  model.pattern[0].attention.heads, model.pattern[0].attention.head_dim = 4, 16
  model.pattern[0].feed_forward.hidden = 256
  e.model, e.optimizer = model, AdamW(lr=1e-3, schedule=Linear(warmup=20))
  return e


def bert() -> Experiment[Any, Any, Any, Any]:
  e = loaded("bert.py:small")
  e.optimizer.schedule.warmup = 20
  return short(e, 200, 8)


def vit() -> Experiment[Any, Any, Any, Any]:
  model = presets.vit("ti/16")
  model.image, model.channels, model.patch, model.classes = 28, 1, 7, 10
  model.dim, model.layers, model.remat = 64, 4, "none"
  model.pattern[0].attention.heads, model.pattern[0].attention.head_dim = 4, 16
  model.pattern[0].feed_forward.hidden = 128
  optimizer = AdamW(lr=1e-3, schedule=Linear(warmup=20))
  return short(experiment(model, GREY, optimizer, Classification()), 400, 32)


def digits_sgd() -> Experiment:
  e = loaded("mlp.py:digits")
  e.optimizer, e.epochs = SGD(lr=0.1, schedule=Constant()), None
  return short(e, 300, 256)


def convolutions() -> Experiment[Any, Any, Any, Any]:
  optimizer = SGD(lr=0.05, schedule=Constant())
  return short(experiment(CNN(), GREY, optimizer, WithNNXModule()), 300, 32)
