"""Published models by size. Each function returns a config of which any field may be changed.

The decoders' dropout is 0: these are shapes for pretraining, where every token is seen about once.
BERT's is as published: it was trained for about forty epochs. T5 1.1 was pretrained without any.
"""

from collections.abc import Mapping
from typing import TypeVar

from bigtrain.config import Refused, nearest
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.encoder import EncoderConfig
from bigtrain.models.encoder_decoder import EncoderDecoderConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import FanIn, Normal
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.latent_attention import LatentAttentionConfig
from bigtrain.models.moe import BalanceLoss, Groups, MoEConfig, RouterConfig
from bigtrain.models.norm import LayerNormConfig, RMSNormConfig
from bigtrain.models.position import Learned, Llama3Scaling, RelativeBuckets, Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import ViTConfig

T = TypeVar("T")

# Radford et al. 2019, table 2; heads from github.com/openai/gpt-2: (dim, layers, heads, head_dim).
GPT2 = {
  "124m": (768, 12, 12, 64),
  "355m": (1024, 24, 16, 64),
  "774m": (1280, 36, 20, 64),
  "1.5b": (1600, 48, 25, 64),
}
# Brown et al. 2020, arXiv:2005.14165, table 2.1: (dim, layers, heads, head_dim). The table gives
# the 1.3b model 24 heads of 128, which fit neither its width nor, with 1.52e9 parameters, its name;
# 16 heads fit both. Its 13b model is 5140 wide with 40 heads of 128 = 5120: taken as printed.
GPT3 = {
  "125m": (768, 12, 12, 64),
  "350m": (1024, 24, 16, 64),
  "760m": (1536, 24, 16, 96),
  "1.3b": (2048, 24, 16, 128),
  "2.7b": (2560, 32, 32, 80),
  "6.7b": (4096, 32, 32, 128),
  "13b": (5140, 40, 40, 128),
  "175b": (12288, 96, 96, 128),
}
# 3.2 (1b, 3b) and 3.1 (8b on; arXiv:2407.21783, table 3), as in the config.json of
# huggingface.co/meta-llama: (dim, layers, heads, head_dim, hidden).
LLAMA3 = {
  "1b": (2048, 16, 32, 64, 8192),
  "3b": (3072, 28, 24, 128, 8192),
  "8b": (4096, 32, 32, 128, 14336),
  "70b": (8192, 80, 64, 128, 28672),
  "405b": (16384, 126, 128, 128, 53248),
}
# arXiv:2505.09388, table 1, and the config.json of huggingface.co/Qwen: (dim, layers, heads,
# hidden); 8 key-value heads, and heads of 128 whatever the width.
QWEN3 = {
  "0.6b": (1024, 28, 16, 3072),
  "8b": (4096, 36, 32, 12288),
}
# arXiv:2401.04088, table 1, and the config.json of huggingface.co/mistralai: (dim, layers, heads,
# hidden of each expert, vocab); 8 experts of which a token has 2, 8 key-value heads of 128.
MIXTRAL = {
  "8x7b": (4096, 32, 32, 14336, 32000),
  "8x22b": (6144, 56, 48, 16384, 32768),
}
# arXiv:2505.09388, table 2, and the config.json of huggingface.co/Qwen: (dim, layers, heads, kv
# heads, hidden of each expert); 128 experts of which a token has 8, heads of 128.
QWEN3_MOE = {
  "30b-a3b": (2048, 48, 32, 4, 768),
  "235b-a22b": (4096, 94, 64, 4, 1536),
}
# Devlin et al. 2018, arXiv:1810.04805, section 3, uncased; MiniLM is the six-layer student of Wang
# et al. 2020, arXiv:2002.10957, of which all-MiniLM-L6-v2 was made: (dim, layers, heads).
BERT = {
  "base": (768, 12, 12),
  "large": (1024, 24, 16),
  "minilm": (384, 6, 12),
}
# Raffel et al. 2020, arXiv:1910.10683, in version 1.1 (with the gates of arXiv:2002.05202), as in
# the config.json of huggingface.co/google/t5-v1_1-*: (dim, layers of each side, heads, hidden);
# heads of 64 whatever the width.
T5 = {
  "small": (512, 8, 6, 1024),
  "base": (768, 12, 12, 2048),
  "large": (1024, 24, 16, 2816),
  "xl": (2048, 24, 32, 5120),
  "xxl": (4096, 24, 64, 10240),
}
# Dosovitskiy 2020, arXiv:2010.11929, table 1 (b, l), Steiner 2021, arXiv:2106.10270, table 2 (s),
# Zhai 2021, arXiv:2106.04560, table 2 (g); "ti" is Steiner's too: (dim, layers, heads, hidden,
# patch).
VIT = {
  "ti/16": (192, 12, 3, 768, 16),
  "s/16": (384, 12, 6, 1536, 16),
  "b/16": (768, 12, 12, 3072, 16),
  "l/16": (1024, 24, 16, 4096, 16),
  "g/14": (1408, 40, 16, 6144, 14),
}


def gpt2(size: str) -> LanguageModelConfig:
  """GPT-2 (Radford et al. 2019): 124m, 355m, 774m or 1.5b."""
  return _gpt(*_shape("gpt2", GPT2, size), context=1024)


def gpt3(size: str) -> LanguageModelConfig:
  """GPT-3 (arXiv:2005.14165): 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b or 175b.

  Attention is full in every layer. The paper's alternates with locally banded sparse attention, of
  a band that it does not state: give every other block of `pattern` a `window` for the like of it.
  """
  return _gpt(*_shape("gpt3", GPT3, size), context=2048)


def _gpt(dim: int, layers: int, heads: int, head_dim: int, context: int) -> LanguageModelConfig:
  attention = AttentionConfig(heads=heads, head_dim=head_dim, bias=True, out_bias=True)
  feed_forward = FeedForwardConfig(hidden=4 * dim, activation="gelu_tanh", bias=True)
  return LanguageModelConfig(
    vocab=50257,
    dim=dim,
    layers=layers,
    pattern=(BlockConfig(attention=attention, feed_forward=feed_forward),),
    position=Learned(length=context),
    norm=LayerNormConfig(eps=1e-5),
    init=Normal(std=0.02, residual="scaled"),
    tied=True,
  )


def llama3(size: str) -> LanguageModelConfig:
  """Llama 3.2 (1b, 3b) and 3.1 (8b, 70b, 405b; arXiv:2407.21783), for 131,072 positions.

  The frequency scaling belongs to the long context: a run of at most 8,192 positions, as most of
  the original training was, can leave it out (`rotary.scaling = None`).
  """
  dim, layers, heads, head_dim, hidden = _shape("llama3", LLAMA3, size)
  small = size in ("1b", "3b")
  scaling = Llama3Scaling(factor=32.0 if small else 8.0)
  rotary = Rotary(theta=500_000.0, scaling=scaling)
  attention = AttentionConfig(heads=heads, kv_heads=8, head_dim=head_dim, rotary=rotary)
  return _decoder(128256, dim, layers, _gated_block(attention, hidden), eps=1e-5, tied=small)


def qwen3(size: str) -> LanguageModelConfig:
  """Qwen3 (arXiv:2505.09388), dense: 0.6b or 8b."""
  dim, layers, heads, hidden = _shape("qwen3", QWEN3, size)
  block = _gated_block(_qwen3_attention(heads, kv_heads=8), hidden)
  return _decoder(151936, dim, layers, block, eps=1e-6, tied=size == "0.6b")


def mixtral(size: str) -> LanguageModelConfig:
  """Mixtral (arXiv:2401.04088): 8x7b or 8x22b."""
  dim, layers, heads, hidden, vocab = _shape("mixtral", MIXTRAL, size)
  attention = AttentionConfig(
    heads=heads, kv_heads=8, head_dim=128, rotary=Rotary(theta=1_000_000.0)
  )
  router = RouterConfig(balance_loss=BalanceLoss(factor=0.02))
  experts = MoEConfig(experts=8, top_k=2, hidden=hidden, router=router)
  block = BlockConfig(attention=attention, feed_forward=experts)
  return _decoder(vocab, dim, layers, block, eps=1e-5)


def qwen3_moe(size: str) -> LanguageModelConfig:
  """Qwen3 with experts (arXiv:2505.09388): 30b-a3b or 235b-a22b.

  As published the loss balances the whole batch, so that experts may specialise.
  """
  dim, layers, heads, kv_heads, hidden = _shape("qwen3_moe", QWEN3_MOE, size)
  router = RouterConfig(balance_loss=BalanceLoss(factor=0.001))
  experts = MoEConfig(experts=128, top_k=8, hidden=hidden, router=router)
  block = BlockConfig(attention=_qwen3_attention(heads, kv_heads), feed_forward=experts)
  return _decoder(151936, dim, layers, block, eps=1e-6)


def deepseek_v3() -> LanguageModelConfig:
  """DeepSeek-V3 (arXiv:2412.19437, section 4.2), without its module for multi-token prediction.

  Latent attention, three dense layers, then 256 narrow experts of which a token has 8 and one that
  all share; experts are balanced by biases, and by a small loss within each row. Positions are as
  in the pretraining on 4,096 tokens.
  """
  attention = LatentAttentionConfig(
    heads=128, q_rank=1536, kv_rank=512, head_dim=128, rotary_dim=64, value_dim=128
  )
  router = RouterConfig(
    scores="sigmoid",
    scale=2.5,
    groups=Groups(groups=8, kept=4),
    balance_loss=BalanceLoss(factor=1e-4, over="row"),
    bias_rate=1e-3,
  )
  experts = MoEConfig(experts=256, top_k=8, hidden=2048, shared=2048, router=router)
  dense = FeedForwardConfig(hidden=18432, activation="silu", gated=True)
  return LanguageModelConfig(
    vocab=129280,
    dim=7168,
    layers=61,
    first=tuple(BlockConfig(attention=attention, feed_forward=dense) for _ in range(3)),
    pattern=(BlockConfig(attention=attention, feed_forward=experts),),
    norm=RMSNormConfig(eps=1e-6),
    init=Normal(std=0.006, residual="same"),
    tied=False,
  )


def bert(size: str) -> EncoderConfig:
  """BERT (arXiv:1810.04805), uncased: base, large or minilm; the bare encoder with its pooler.

  MaskedLMConfig and TextClassifierConfig put heads on it.
  """
  dim, layers, heads = _shape("bert", BERT, size)
  attention = AttentionConfig(heads=heads, causal=False, bias=True, out_bias=True, dropout=0.1)
  feed_forward = FeedForwardConfig(hidden=4 * dim, activation="gelu", bias=True)
  return EncoderConfig(
    vocab=30522,
    dim=dim,
    layers=layers,
    pattern=(BlockConfig(attention=attention, feed_forward=feed_forward),),
    position=Learned(length=512),
    norm=LayerNormConfig(eps=1e-12),
    norm_placement="post",
    dropout=0.1,
    init=Normal(std=0.02, residual="same"),
  )


def t5(size: str) -> EncoderDecoderConfig:
  """T5 (arXiv:1910.10683), version 1.1: small, base, large, xl or xxl.

  Relative positions, RMS norms before each branch, no biases, scores that are not scaled, a gated
  GELU, and an output table of its own.
  """
  dim, layers, heads, hidden = _shape("t5", T5, size)
  attention = AttentionConfig(heads=heads, head_dim=64, causal=False, scaled=False)
  feed_forward = FeedForwardConfig(hidden=hidden, activation="gelu_tanh", gated=True)
  return EncoderDecoderConfig(
    vocab=32128,
    dim=dim,
    layers=layers,
    pattern=(BlockConfig(attention=attention, feed_forward=feed_forward),),
    norm=RMSNormConfig(eps=1e-6),
    relative=RelativeBuckets(buckets=32, distance=128),
    init=FanIn(),
    tied=False,
  )


def vit(size: str) -> ViTConfig:
  """ViT (arXiv:2010.11929): ti/16, s/16, b/16, l/16 or g/14, for images of 224 pixels.

  With a class token and 1,000 classes, as the files of timm and big_vision that carry these names.
  """
  dim, layers, heads, hidden, patch = _shape("vit", VIT, size)
  attention = AttentionConfig(heads=heads, causal=False, bias=True, out_bias=True)
  feed_forward = FeedForwardConfig(hidden=hidden, activation="gelu", bias=True)
  return ViTConfig(
    patch=patch,
    dim=dim,
    layers=layers,
    pattern=(BlockConfig(attention=attention, feed_forward=feed_forward),),
    norm=LayerNormConfig(eps=1e-6),
    init=Normal(std=0.02, residual="same"),
  )


def _decoder(
  vocab: int, dim: int, layers: int, block: BlockConfig, *, eps: float, tied: bool = False
) -> LanguageModelConfig:
  return LanguageModelConfig(
    vocab=vocab,
    dim=dim,
    layers=layers,
    pattern=(block,),
    norm=RMSNormConfig(eps=eps),
    init=Normal(std=0.02, residual="scaled"),
    tied=tied,
  )


def _qwen3_attention(heads: int, kv_heads: int) -> AttentionConfig:
  return AttentionConfig(
    heads=heads,
    kv_heads=kv_heads,
    head_dim=128,
    rotary=Rotary(theta=1_000_000.0),
    qk_norm=RMSNormConfig(eps=1e-6),
  )


def _gated_block(attention: AttentionConfig, hidden: int) -> BlockConfig:
  feed_forward = FeedForwardConfig(hidden=hidden, activation="silu", gated=True)
  return BlockConfig(attention=attention, feed_forward=feed_forward)


def _shape(family: str, table: Mapping[str, T], size: str) -> T:
  if size not in table:
    raise Refused(f"presets.{family} has no size {size!r}{nearest(size, table)}")
  return table[size]
