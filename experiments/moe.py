"""Mixtures of experts: a small one that trains on two cores, and three published ones.

Edit DATA and TOKENIZER for the published ones: any text, and the tokenizer.json of the model.
"""

import dataclasses

from bigtrain import Checkpoints, Evaluation, Experiment, Mesh
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE, TokenizerFile
from bigtrain.models import presets
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.initial import Normal
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.moe import BalanceLoss, MoEConfig, RouterConfig
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine, Linear
from bigtrain.parallel.expert import Capacity, Dropless

DATA = "data/fineweb-edu/**/*.parquet"
TOKENIZER = "data/{}/tokenizer.json"


def base() -> Experiment:
  """Eight experts, of which a token has two, on the prose of Jane Austen."""
  return _small(router=RouterConfig(z_loss=1e-3))


def loss_free() -> Experiment:
  """Do biases keep experts as even as a loss does, and is the held-out loss lower?"""
  return _small(router=RouterConfig(scores="sigmoid", balance_loss=None, bias_rate=1e-3))


def capacity() -> Experiment:
  """What does it cost to leave out what exceeds an expert's even share by a quarter?"""
  return _small(RouterConfig(z_loss=1e-3), Capacity(factor=1.25))


def by_row() -> Experiment:
  """Does balance within each row cost anything against balance over the batch?"""
  return _small(router=RouterConfig(z_loss=1e-3, balance_loss=BalanceLoss(over="row")))


def mixtral_8x7b() -> Experiment:
  """46.7B parameters, of which a token meets 12.9B."""
  return _study(presets.mixtral("8x7b"), "mixtral", lr=3e-4, expert=8)


def qwen3_30b_a3b() -> Experiment:
  """30.5B parameters, of which a token meets 3.4B."""
  return _study(presets.qwen3_moe("30b-a3b"), "qwen3", lr=3e-4, expert=8)


def deepseek_v3() -> Experiment:
  """671B parameters, of which a token meets 37.6B, at the paper's rate (section 4.2)."""
  return _study(presets.deepseek_v3(), "deepseek-v3", lr=2.2e-4, expert=32)


def _small(router: RouterConfig, dispatch: Dropless | Capacity | None = None) -> Experiment:
  """The quickstart's model with experts in place of its network."""
  experts = MoEConfig(experts=8, top_k=2, hidden=256, router=router)
  experts.dispatch = dispatch or Dropless()
  attention = AttentionConfig(heads=4, rotary=Rotary(), qk_norm=RMSNormConfig())
  return Experiment(
    model=LanguageModelConfig(
      vocab=2048,
      dim=128,
      layers=4,
      pattern=(BlockConfig(attention=attention, feed_forward=experts),),
      init=Normal(residual="zero"),
      remat="none",
    ),
    data=TextData(tokenizer=BPE(vocab=2048), seq=128),
    objective=CausalLM(),
    optimizer=AdamW(lr=3e-3, schedule=Linear(warmup=50), weight_decay=0.1),
    steps=500,
    batch=32,
    evaluation=Evaluation(every=250, prompts=("It was a truth",)),
    checkpoints=Checkpoints(every=250),
  )


def _study(model: LanguageModelConfig, name: str, lr: float, expert: int) -> Experiment:
  """A model on rows of 4,096 tokens, with room on each device for twice its even share."""
  block = model.pattern[0]
  block.feed_forward = dataclasses.replace(block.feed_forward, dispatch=Dropless(buffer=2.0))
  tokenizer = TokenizerFile(path=TOKENIZER.format(name))
  return Experiment(
    model=model,
    data=TextData(source=Files(pattern=DATA), tokenizer=tokenizer, seq=4096),
    optimizer=AdamW(lr=lr, schedule=Cosine(warmup=2000)),
    objective=CausalLM(),
    steps=500_000,
    batch=1024,
    mesh=Mesh(expert=expert),
    evaluation=Evaluation(every=5000, batch=512),
    checkpoints=Checkpoints(every=1000),
  )
