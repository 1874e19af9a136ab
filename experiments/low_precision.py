"""The quickstart's study in fewer bits: what of its loss is left?

Products in int8 or float8, moments of eight bits, weights in bfloat16; docs/precision.md has the
figures. The formats are what matters here, so that activations are in bfloat16 on CPU too.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Linear
from bigtrain.products import Delayed, Gradients, Products


def base() -> Experiment:
  """All in bfloat16 but the weights and the optimizer."""
  block = BlockConfig(
    attention=AttentionConfig(heads=4, rotary=Rotary()),
    feed_forward=FeedForwardConfig(hidden=512, activation="relu2"),
  )
  return Experiment(
    model=LanguageModelConfig(vocab=2048, dim=128, layers=4, pattern=(block,), dtype="bfloat16"),
    data=TextData(tokenizer=BPE(vocab=2048), seq=128),
    objective=CausalLM(),
    optimizer=AdamW(lr=3e-3, schedule=Linear(warmup=50)),
    steps=500,
    batch=32,
    evaluation=Evaluation(every=250),
    checkpoints=Checkpoints(every=250),
  )


def int8() -> Experiment:
  """Every weight product in int8, with a scale for each token and each output."""
  e = base()
  e.products = Products()
  return e


def float8() -> Experiment:
  """Every weight product in float8, scaled by what the updates before have seen."""
  e = base()
  gradients = Gradients(format="float8_e5m2")
  e.products = Products(format="float8_e4m3fn", gradients=gradients, scaling=Delayed())
  return e


def small_state() -> Experiment:
  """bfloat16 weights, rounded at random, and moments of eight bits: 4 bytes a parameter, not 12."""
  e = base()
  e.weights, e.optimizer.moments = "bfloat16", "int8"
  return e
