"""A small transformer learns the prose of Jane Austen in minutes, on two CPU cores."""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Normal
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Linear


def base() -> Experiment:
  """Rotary positions, normalised queries and keys, squared ReLU."""
  block = BlockConfig(
    attention=AttentionConfig(heads=4, rotary=Rotary(), qk_norm=RMSNormConfig()),
    feed_forward=FeedForwardConfig(hidden=512, activation="relu2"),
  )
  return Experiment(
    model=LanguageModelConfig(
      vocab=2048,
      dim=128,
      layers=4,
      pattern=(block,),
      init=Normal(residual="zero"),
      remat="none",  # There is memory enough, and
      unroll=4,  # four layers compile fast enough as they are.
    ),
    data=TextData(tokenizer=BPE(vocab=2048), seq=128),
    objective=CausalLM(),
    optimizer=AdamW(lr=3e-3, schedule=Linear(warmup=50), weight_decay=0.1),
    steps=500,
    batch=32,
    evaluation=Evaluation(every=250, prompts=("It was a truth",)),
    checkpoints=Checkpoints(every=250),
  )
