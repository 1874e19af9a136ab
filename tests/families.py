"""A study of each family of models, as people write them, and its small copy for parity tests."""

import copy
import dataclasses
import functools

import jax

from bigtrain.config import configs
from bigtrain.data.masked import MaskedText
from bigtrain.data.spans import Spans
from bigtrain.data.text import TextData
from bigtrain.experiment import Experiment, ModelConfig
from bigtrain.interop.nnx_module import WithNNXModule
from bigtrain.mesh import Mesh
from bigtrain.models import presets
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.encoder import MaskedLMConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Mup
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.moe import MoEConfig, RouterConfig
from bigtrain.models.norm import LayerNormConfig, RMSNormConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import AttentionPoolConfig, ViTConfig
from bigtrain.objectives import CausalLM, MaskedLM, SpanCorruption
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.muon import Muon
from bigtrain.optim.schedule_free import ScheduleFreeAdamW
from bigtrain.optim.sgd import SGD
from bigtrain.optim.soap import SOAP
from bigtrain.parity import Reference, Report, compare, shrink
from bigtrain.parity.shrink import size
from tests import classes
from tests.interop.test_nnx_module import CNNConfig

BATCH = 8  # Rows, on any mesh: one device's steps serve for all.
OPTIMIZERS = {
  "adamw": AdamW(lr=1e-2, average=0.9),
  "muon": Muon(lr=2e-2, weight_decay=0.1),
  "soap": SOAP(lr=1e-2),
  "adafactor": Adafactor(lr=1e-2),
  "schedule-free": ScheduleFreeAdamW(lr=1e-2),
  "sgd": SGD(lr=0.1, clip=0.1, nesterov=True),
}
MIXED = Classification(label_smoothing=0.1, mixup=0.4, cutmix=1.0)


def study(model: ModelConfig, data, objective, optimizer: str, **fields) -> Experiment:
  parts = {"model": model, "data": data, "objective": objective}
  return Experiment(**parts, optimizer=OPTIMIZERS[optimizer], steps=100, batch=32, **fields)


def gpt2() -> LanguageModelConfig:
  model = presets.gpt2("124m")
  model.vocab = 50304
  return model


def mup() -> LanguageModelConfig:
  model = gpt2()
  model.init = Mup(base=256, head_dim=32)
  return model


def llama() -> LanguageModelConfig:
  """Grouped queries, rotations, gates, and windows in one block of two."""
  model = presets.llama3("8b")
  (block,) = model.pattern
  local = dataclasses.replace(block.attention, window=1024, qk_norm=RMSNormConfig())
  model.pattern, model.layers = (dataclasses.replace(block, attention=local), block), 33
  return model


def moe() -> LanguageModelConfig:
  """Everything that a router adds to a loss, and biases besides."""
  model = presets.mixtral("8x7b")
  (block,) = model.pattern
  block.feed_forward.router = RouterConfig(z_loss=1e-2, bias_rate=1e-2)
  return model


def vit() -> ViTConfig:
  attention = AttentionConfig(heads=8, causal=False, bias=True)
  block = BlockConfig(attention=attention, feed_forward=FeedForwardConfig(hidden=40, bias=True))
  pool = AttentionPoolConfig(heads=8, hidden=24)
  sizes = {"image": classes.R, "channels": classes.CHANNELS, "patch": 4, "classes": classes.C}
  return ViTConfig(**sizes, pool=pool, dim=32, layers=2, pattern=(block,), drop_path=0.3)


MLP = MLPConfig(
  inputs=classes.R * classes.S * classes.CHANNELS,
  hidden=(16, 24, 24),
  classes=classes.C,
  activation="prelu",
  norm=LayerNormConfig(),
  residual=True,
)
BERT = MaskedLMConfig(encoder=presets.bert("base"), next_sentence=True)
# The one place where a family is added.
STUDIES = {
  "gpt2": study(gpt2(), TextData(), CausalLM(), "adamw", microbatches=2),
  "mup": study(mup(), TextData(), CausalLM(), "adamw"),
  "llama": study(llama(), TextData(), CausalLM(z_loss=1e-4), "muon"),
  "bert": study(BERT, MaskedText(next_sentence=True), MaskedLM(), "schedule-free"),
  "t5": study(presets.t5("small"), Spans(), SpanCorruption(), "adafactor"),
  "moe": study(moe(), TextData(), CausalLM(), "adamw"),
  "mla": study(presets.deepseek_v3(), TextData(), CausalLM(), "muon"),
  "vit": study(vit(), classes.Blobs(), MIXED, "soap"),
  "mlp": study(MLP, classes.Blobs(), Classification(), "sgd"),
  "nnx": study(CNNConfig(), classes.Blobs(), WithNNXModule(), "adamw"),
}


def plain(*, experts: bool = False) -> Experiment:
  """Two layers of rotations, RMS norms and dropout: what faults are planted in."""
  block = BlockConfig(
    attention=AttentionConfig(heads=4, rotary=Rotary()),
    feed_forward=MoEConfig(experts=4, top_k=2, hidden=64)
    if experts
    else FeedForwardConfig(hidden=64),
  )
  mesh = Mesh(data=2, fsdp=1, expert=2) if experts else Mesh(data=2, fsdp=2)
  model = LanguageModelConfig(vocab=128, dim=32, layers=2, pattern=(block,), remat="none")
  e = study(model, TextData(), CausalLM(), "sgd", mesh=mesh)
  e = dataclasses.replace(shrink(e), steps=2, batch=BATCH)
  (block,) = e.model.pattern
  e.model.drop_path = block.attention.dropout = 0.0
  if not experts:
    block.feed_forward.dropout = 0.0
  return e


def small(name: str, mesh: Mesh, optimizer: str | None = None) -> Experiment:
  e = STUDIES[name]
  if optimizer is not None:
    e = dataclasses.replace(e, optimizer=OPTIMIZERS[optimizer])
  e = dataclasses.replace(e, mesh=mesh, model=copy.deepcopy(e.model))
  for _, node in configs(e.model):
    if isinstance(node, AttentionConfig) and mesh.context > 1:
      node.dropout = 0.0  # Where rows are cut attention has none.
  e = shrink(e)
  return dataclasses.replace(e, batch=BATCH * e.microbatches)


@functools.cache
def _reference(e: Experiment) -> Reference:
  return Reference(e)


def reference(e: Experiment) -> Reference:
  """The steps on one device, made once for all meshes."""
  return _reference(dataclasses.replace(e, mesh=Mesh()))


def check(e: Experiment) -> Report:
  """On the experiment's mesh over as many devices as it wants."""
  return compare(e, reference(e), e.mesh.make(jax.devices()[: size(e.mesh)]))
