"""Encoder-decoders as T5 is one (Raffel et al. 2020, arXiv:1910.10683).

The encoder reads a row of tokens and sees both sides; the decoder predicts another row, seeing what
comes before and all of the encoder's output. Both are stacks of the shared transformer, the
decoder's blocks with one more attention.

Dims: B batch, S source position (the encoder's), T target position (the decoder's), D model, V
vocabulary, K kv heads, H head, P distance.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.experiment import ModelConfig
from bigtrain.kernels.attention import Tokens
from bigtrain.models.attention import AttentionConfig, Memory
from bigtrain.models.initial import Initializer
from bigtrain.models.position import lookup
from bigtrain.models.transformer import Block, BlockConfig, Cache, Transformer, TransformerConfig
from bigtrain.parallel import pipeline
from bigtrain.parallel.context import before
from bigtrain.precision import Dtype, compute_dtype, raised


@config
class CrossBlockConfig(BlockConfig):
  """A decoder's layer."""

  cross: AttentionConfig  # To the encoder's output.

  def make(self, stack: TransformerConfig, init: Initializer, key: jax.Array) -> "CrossBlock":
    return CrossBlock(self, stack, init, key)


class CrossBlock(Block):
  """Attention, attention to a memory, then a feed-forward network."""

  def __init__(
    self, c: CrossBlockConfig, stack: TransformerConfig, init: Initializer, key: jax.Array
  ):
    key, kc = jax.random.split(key)
    Block.__init__(self, c, stack, init, key)
    self.cross = c.cross.make(stack.dim, init, kc)
    self.cross_norm = stack.norm.make(stack.dim)
    sandwich = stack.norm_placement == "sandwich"
    self.cross_out_norm = stack.norm.make(stack.dim) if sandwich else None

  def __call__(
    self,
    x_BTD,
    tokens: Tokens,
    key=None,
    cache=None,
    drop_path=None,
    bias_KGP=None,
    memory: Memory | None = None,
  ) -> tuple[jax.Array, Any]:
    assert memory is not None
    ka, kd, kc, kx, *kf = (None,) * 6 if key is None else jax.random.split(key, 6)
    attend = lambda h_BTD: self.attention(h_BTD, tokens, ka, cache, bias_KGP)
    x_BTD, cache = self.branch("attention", attend, x_BTD, kd, drop_path)
    across = lambda h_BTD: (self.cross.across(h_BTD, tokens, memory, kc), None)
    x_BTD, _ = self.branch("cross", across, x_BTD, kx, drop_path)
    return self.feed(x_BTD, tokens, kf, drop_path), cache


@config
class EncoderDecoderConfig(TransformerConfig, ModelConfig):
  """Two transformers of one shape between a vocabulary and itself; they share the embedding.

  `pattern` are the encoder's blocks. The decoder's are the same, but causal, and with attention to
  the encoder's output, of as many heads.
  """

  vocab: int  # Tokens; must be what the tokenizer has, or more.
  decoder_layers: int | None = None  # Of the decoder; None for as many as the encoder has.
  tied: bool = False  # The output table is the embedding, for hidden states times dim**-0.5.
  start: int = 0  # The token that the decoder begins with: T5's padding.
  dtype: Dtype = "auto"  # Of activations: bfloat16 on accelerators, float32 on CPU.

  def make(self, key: jax.Array) -> "EncoderDecoder":
    return EncoderDecoder(self, key)

  def encoder(self) -> TransformerConfig:
    """The encoder's stack."""
    fields = (field.name for field in dataclasses.fields(TransformerConfig))
    return TransformerConfig(**{name: getattr(self, name) for name in fields})

  def decoder(self) -> TransformerConfig:
    """The decoder's stack."""
    return dataclasses.replace(
      self.encoder(),
      layers=self.decoder_layers or self.layers,
      first=tuple(map(_with_cross, self.first)),
      pattern=tuple(map(_with_cross, self.pattern)),
    )

  def dims(self) -> dict[str, tuple[str, int]]:
    return TransformerConfig.dims(self) | {"vocab": ("V", self.vocab)}

  def flops(self, length: int = 1, targets: int | None = None) -> float:
    """As in ModelConfig: of a row of `length` tokens, and of as many targets unless given."""
    targets = length if targets is None else targets
    total = self.encoder().flops(length) + self.decoder().flops(targets)
    for blocks, repeats in self.decoder().segments():
      for block in blocks:
        s = block.attention.sizes(self.dim)
        heads = s["K"] * s["G"]
        weights = self.dim * s["H"] * 2 * (heads * targets + s["K"] * length)
        total += repeats * (6 * weights + 12 * heads * s["H"] * targets * length)
    return total + 6 * targets * self.dim * self.vocab

  def check_stages(self, stages: int, rows: int) -> None:
    for stack in (self.encoder(), self.decoder()):
      stack.check_stages(stages, rows)

  def vocabulary(self) -> int:
    return self.vocab

  def cuts_rows(self) -> bool:
    return True

  def check(self) -> None:
    TransformerConfig.check(self)
    if not 0 <= self.start < self.vocab:
      raise Refused(f"model: start is {self.start}; it is a token, from 0 to {self.vocab - 1}")
    if not all(isinstance(b.attention, AttentionConfig) for b in (*self.first, *self.pattern)):
      raise Refused("model: an encoder-decoder has no latent attention; set an AttentionConfig")
    if any(block.attention.causal for block in (*self.first, *self.pattern)):
      raise Refused(
        "model: `pattern` are the encoder's blocks, which see both sides; set attention.causal to "
        "False (the decoder's are causal)"
      )
    if self.decoder_layers is not None and self.decoder_layers < len(self.first) + 1:
      raise Refused(
        f"model: decoder_layers is {self.decoder_layers}; it must be at least "
        f"{len(self.first) + 1}, or None for as many as the encoder has"
      )


def _with_cross(block: BlockConfig) -> CrossBlockConfig:
  """The decoder's block for one of the encoder: distances to the other side mean nothing."""
  assert isinstance(block.attention, AttentionConfig)
  return CrossBlockConfig(
    attention=dataclasses.replace(block.attention, causal=True),
    cross=dataclasses.replace(block.attention, rotary=None, window=None),
    feed_forward=block.feed_forward,
  )


class EncoderDecoder(nnx.Module):
  continues = False  # A prompt is what the encoder reads; what is sampled answers it.

  def __init__(self, c: EncoderDecoderConfig, key: jax.Array):
    self.c = c
    ke, kn, kd, ko = jax.random.split(key, 4)
    init, sizes = Initializer(c.init, c.layers), {"V": c.vocab, "D": c.dim}
    norm = functools.partial(c.norm.make, c.dim)
    # A row is looked up, nothing is summed: T5's have variance 1 (`FanIn`).
    self.embed_VD = init.weight(ke, "VD", sizes, fan_in="")
    self.encoder, self.decoder = Transformer(c.encoder(), kn), Transformer(c.decoder(), kd)
    self.encoder_norm, self.decoder_norm = (
      None if c.norm_placement == "post" else norm() for _ in range(2)
    )
    self.output_table_VD = None if c.tied else init.weight(ko, "VD", sizes, fan_in="D")

  def __call__(
    self,
    tokens_BS,
    inputs_BT,
    source: Tokens | None = None,
    target: Tokens | None = None,
    key=None,
  ) -> jax.Array:
    """Logits (B, T, V) float32 of the token after each of `inputs_BT`.

    Args:
      tokens_BS: token ids that the encoder reads.
      inputs_BT: token ids that the decoder reads: `start`, then the targets but the last.
      source: positions and documents of the encoder's tokens; by default a row is one document
        without padding. Where it has documents, 0 is padding.
      target: those of the decoder's. A token sees its own document, on both sides.
      key: dropout's key; None (no dropout) outside training.
    """
    return self.logits(self.hidden(tokens_BS, inputs_BT, source, target, key))

  def hidden(
    self,
    tokens_BS,
    inputs_BT,
    source: Tokens | None = None,
    target: Tokens | None = None,
    key=None,
  ) -> jax.Array:
    """What is multiplied by the output table, (B, T, D), in the compute dtype."""
    ke, kd = (None, None) if key is None else jax.random.split(key)
    source = source or _one_document(tokens_BS)
    memory = Memory(source, self.encode(tokens_BS, source, ke))
    return self._decode(inputs_BT, target or _one_document(inputs_BT), kd, None, memory)[0]

  def encode(self, tokens_BS, source: Tokens, key=None) -> jax.Array:
    """The encoder's output (B, S, D), in the compute dtype; arguments as in __call__."""
    with taps.named("encoder"):
      x_BSD, _ = self._stack(self.encoder, self.encoder_norm, tokens_BS, source, key)
    return x_BSD

  def shifted(self, targets_BT, positions_BT) -> jax.Array:
    """The decoder's inputs for these targets: each the target before it, first `start`."""
    return jnp.where(positions_BT == 0, self.c.start, before(targets_BT))

  def begin(
    self, tokens_BS, positions_BS, length: int
  ) -> tuple[jax.Array, jax.Array, tuple[Cache, Memory]]:
    """Reads prompts, for which `length` tokens at most will be sampled; as in LanguageModel.

    Each layer's keys and values of the encoder's output are computed here, once.
    """
    B, source = len(tokens_BS), Tokens(positions_BS)
    x_BSD = sharding.shared(self.encode(tokens_BS, source))
    of_layer = lambda _, layer: (None, layer[0].cross.keys_values(x_BSD, source))
    of_stack = lambda block: pipeline.layer_scan(of_layer, None, block, ())[1]
    pairs = [[of_stack(block) for block in s] for s in self.decoder.segments]
    cache = self.decoder.cache(B, length, compute_dtype(self.c.dtype))
    start_B = jnp.zeros_like(tokens_BS[:, 0])
    return start_B + self.c.start, start_B, (cache, Memory(source, pairs=pairs))

  def decode(
    self, inputs_BT, positions_BT, cache: tuple[Cache, Memory]
  ) -> tuple[jax.Array, tuple[Cache, Memory]]:
    """Logits (B, T, V) of the tokens after these, which follow what the cache holds."""
    own, memory = cache
    x_BTD, own = self._decode(inputs_BT, Tokens(positions_BT), None, own, memory)
    return self.logits(x_BTD), (own, memory)

  def logits(self, x_BTD) -> jax.Array:
    """Logits (B, T, V) float32 of what `hidden` returns."""
    wide = raised(x_BTD.dtype)
    return jnp.einsum("btd,vd->btv", x_BTD, self.output_VD(x_BTD), preferred_element_type=wide)

  def output_VD(self, x_BTD) -> jax.Array:
    """The table whose products with a hidden state are its logits: gathered, compute dtype."""
    table_VD = self.embed_VD if self.output_table_VD is None else self.output_table_VD
    over = sharding.split_over(x_BTD, 2)
    return sharding.use(table_VD, "VD", compute_dtype(self.c.dtype), over)

  def _decode(self, inputs_BT, target: Tokens, key, cache, memory: Memory) -> tuple[Any, Any]:
    with taps.named("decoder"):
      x_BTD, cache = self._stack(
        self.decoder, self.decoder_norm, inputs_BT, target, key, cache, memory
      )
    return x_BTD * (self.c.dim**-0.5 if self.c.tied else 1.0), cache

  def _stack(self, stack: Transformer, norm, tokens_BT, tokens: Tokens, key, *context):
    """Embedding, all layers, norm; dropout before and behind."""
    kd, ks, ko = (None,) * 3 if key is None else jax.random.split(key, 3)
    with jax.named_scope("embed"):
      x_BTD = lookup(self.embed_VD, tokens_BT, compute_dtype(self.c.dtype))
    x_BTD = dropout(x_BTD, self.c.dropout, kd)
    x_BTD, cache = stack(x_BTD, tokens, ks, *context)
    x_BTD = x_BTD if norm is None else norm(x_BTD)
    return dropout(x_BTD, self.c.dropout, ko), cache


def _one_document(tokens_BT) -> Tokens:
  return Tokens(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape))
