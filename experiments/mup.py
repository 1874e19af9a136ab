"""Does a learning rate tuned on a narrow model hold on one eight times as wide? (docs/mup.md)

Two layers, four heads and bytes: the narrow model is tuned in seconds, and the wide one has 25
million weights. All widths grow together, and the heads with them.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.text import TextData
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import FanIn, Mup
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Linear

BASE, HEADS = 128, 4
STANDARD = FanIn(residual="scaled")


def base() -> Experiment:
  """The narrow model; its learning rate is the best of a sweep."""
  return _study(BASE, Mup(base=BASE, head_dim=BASE // HEADS, at_base=STANDARD))


def wide() -> Experiment:
  """Eight times as wide, at the same learning rate."""
  return _study(8 * BASE, base().model.init)


def wide_standard() -> Experiment:
  """As wide in the standard parametrisation: at this learning rate it is worse than the base."""
  return _study(8 * BASE, STANDARD)


def _study(
  dim: int, init: FanIn | Mup
) -> Experiment[LanguageModelConfig, TextData, AdamW, CausalLM]:
  block = BlockConfig(
    attention=AttentionConfig(heads=HEADS, rotary=Rotary()),
    feed_forward=FeedForwardConfig(hidden=4 * dim),
  )
  return Experiment(
    model=LanguageModelConfig(
      vocab=384,  # 257, and what makes it a multiple of 128.
      dim=dim,
      layers=2,
      pattern=(block,),
      init=init,
      remat="none",
      unroll=2,
    ),
    data=TextData(seq=64),
    objective=CausalLM(),
    optimizer=AdamW(lr=2**-7, schedule=Linear(warmup=10)),
    steps=60,
    batch=8,
    evaluation=Evaluation(every=0, batch=64),
    checkpoints=Checkpoints(every=60),
  )
