"""Bidirectional encoders as BERT is one (Devlin et al. 2018, arXiv:1810.04805), and their heads.

Dims: B batch, T position, D model, M model too (what a dense layer of a head gives), V vocabulary,
Y token type, C class.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.experiment import ModelConfig
from bigtrain.kernels.attention import Tokens
from bigtrain.models.initial import Initializer
from bigtrain.models.position import Learned, lookup
from bigtrain.models.transformer import Transformer, TransformerConfig
from bigtrain.parallel.context import first
from bigtrain.precision import Dtype, compute_dtype, project
from bigtrain.width import Width, readout


@config
class EncoderConfig(TransformerConfig, ModelConfig):
  """A transformer over a vocabulary, with the pooler of BERT. Its attention is not causal."""

  vocab: int  # Tokens; must be what the tokenizer has, or more.
  position: Learned | None = None  # Added to the embedding; rotations are attention's.
  token_types: int = 2  # Kinds of tokens, such as those of a pair's two texts.
  dtype: Dtype = "auto"  # Of activations: bfloat16 on accelerators, float32 on CPU.

  def make(self, key: jax.Array) -> "Encoder":
    return Encoder(self, key)

  def dims(self) -> dict[str, tuple[str, int]]:
    return TransformerConfig.dims(self) | {"vocab": ("V", self.vocab)}

  def vocabulary(self) -> int:
    return self.vocab

  def cuts_rows(self) -> bool:
    return True

  def longest_row(self) -> int | None:
    return None if self.position is None else self.position.length

  def check(self) -> None:
    TransformerConfig.check(self)
    for name in ("vocab", "token_types"):
      if getattr(self, name) < 1:
        raise Refused(f"model: {name} is {getattr(self, name)}; it must be positive")
    if any(block.attention.causal for block in (*self.first, *self.pattern)):
      raise Refused("model: an encoder's attention sees both sides; set attention.causal to False")


class Encoder(nnx.Module):
  def __init__(self, c: EncoderConfig, key: jax.Array, *, pooled: bool = True):
    self.c = c
    init = Initializer(c.init, c.layers, c.width())
    ke, kp, ky, kt, km = jax.random.split(key, 5)
    length = c.position.length if c.position else 0
    sizes = {"V": c.vocab, "D": c.dim, "M": c.dim, "T": length, "Y": c.token_types}
    self.embed_VD = init.weight(ke, "VD", sizes, fan_in="D")
    self.position_TD = init.weight(kp, "TD", sizes, fan_in="D") if c.position else None
    self.type_YD = init.weight(ky, "YD", sizes, fan_in="D")
    self.embed_norm = c.norm.make(c.dim)
    self.transformer = Transformer(c, kt)
    self.norm = None if c.norm_placement == "post" else c.norm.make(c.dim)
    self.pooler_DM = init.weight(km, "DM", sizes, fan_in="D") if pooled else None
    self.pooler_bias_M = init.constant("M", sizes) if pooled else None

  def __call__(
    self, tokens_BT, positions_BT=None, segments_BT=None, types_BT=None, key=None
  ) -> jax.Array:
    """The last hidden state (B, T, D), in the compute dtype.

    Args:
      tokens_BT: token ids.
      positions_BT: position of each token in its document; by default a row is one document.
      segments_BT: the document of each token within its row, 0 for padding; attention stays within
        it. By default a row is one document without padding.
      types_BT: token types below `token_types`; by default 0.
      key: dropout's key; None (no dropout) outside training.
    """
    tokens_BT, c = jnp.asarray(tokens_BT), self.c
    dtype = compute_dtype(c.dtype)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if types_BT is None:
      types_BT = jnp.zeros_like(tokens_BT)
    tokens = Tokens(jnp.asarray(positions_BT), segments_BT)
    kd, kt = (None, None) if key is None else jax.random.split(key)
    with jax.named_scope("embed"):
      x_BTD = lookup(self.embed_VD, tokens_BT, dtype) + lookup(self.type_YD, types_BT, dtype)
      if self.position_TD is not None:
        x_BTD += lookup(self.position_TD, tokens.positions, dtype)
      x_BTD = dropout(self.embed_norm(x_BTD), c.dropout, kd)
    with taps.named("transformer"):
      x_BTD, _ = self.transformer(x_BTD, tokens, kt)
    return x_BTD if self.norm is None else self.norm(x_BTD)

  def pooled(self, x_BTD) -> jax.Array:
    """What stands for a row as a whole, (B, M): tanh of a dense layer over its first position."""
    return jnp.tanh(project("BD,DM->BM", first(x_BTD), self.pooler_DM, self.pooler_bias_M))


@config
class MaskedLMConfig(ModelConfig):
  """An encoder that predicts masked tokens, and, where asked, whether a text follows another."""

  encoder: EncoderConfig
  next_sentence: bool = False  # Also a head on the pooled row; without it there is no pooler.

  def make(self, key: jax.Array) -> "MaskedLanguageModel":
    return MaskedLanguageModel(self, key)

  def dims(self) -> dict[str, tuple[str, int]]:
    return _dims(self.encoder)

  def width(self) -> Width | None:
    return self.encoder.width()

  def flops(self, length: int = 1) -> float:
    e = self.encoder
    return e.flops(length) + 6 * length * e.dim * (e.dim + e.vocab)

  def vocabulary(self) -> int:
    return self.encoder.vocab

  def cuts_rows(self) -> bool:
    return True

  def longest_row(self) -> int | None:
    return self.encoder.longest_row()

  def n_token_types(self) -> int:
    return self.encoder.token_types

  def check(self) -> None:
    if self.next_sentence and self.encoder.token_types < 2:
      raise Refused("model: next_sentence tells two texts apart; set encoder.token_types to 2")


class MaskedLanguageModel(nnx.Module):
  """The encoder with the heads of BERT's pretraining; the output table is the embedding."""

  def __init__(self, c: MaskedLMConfig, key: jax.Array):
    self.c = c
    ke, kt, kn = jax.random.split(key, 3)
    init = Initializer(c.encoder.init, c.encoder.layers, c.width())
    sizes = {"V": c.encoder.vocab, "D": c.encoder.dim, "M": c.encoder.dim, "C": 2}
    self.encoder = Encoder(c.encoder, ke, pooled=c.next_sentence)
    self.transform_DM = init.weight(kt, "DM", sizes, fan_in="D")
    self.transform_bias_M = init.constant("M", sizes)
    self.transform_norm = c.encoder.norm.make(c.encoder.dim)
    self.output_bias_V = init.constant("V", sizes)
    self.next_MC = init.weight(kn, "MC", sizes, fan_in="M") if c.next_sentence else None
    self.next_bias_C = init.constant("C", sizes) if c.next_sentence else None

  def __call__(
    self, tokens_BT, positions_BT=None, segments_BT=None, types_BT=None, key=None
  ) -> jax.Array:
    """Logits (B, T, V) float32 of the token at each position; arguments as in Encoder."""
    x_BTD = self.encoder(tokens_BT, positions_BT, segments_BT, types_BT, key)
    x_BTM = self.predictions(x_BTD)
    table_VD, bias_V = self.output(x_BTM)
    logits_BTV = jnp.einsum("btm,vm->btv", x_BTM, table_VD, preferred_element_type=jnp.float32)
    return logits_BTV + bias_V

  def predictions(self, x_BTD) -> jax.Array:
    """What is multiplied by the output table, (B, T, M), from the encoder's last hidden state."""
    x_BTM = project("BTD,DM->BTM", x_BTD, self.transform_DM, self.transform_bias_M)
    return self.transform_norm(jax.nn.gelu(x_BTM, approximate=False))

  def output(self, x_BTM) -> tuple[jax.Array, jax.Array]:
    """The table that predictions are multiplied with, gathered and in the compute dtype, and its
    bias (V,) float32."""
    dtype, over = compute_dtype(self.c.encoder.dtype), sharding.split_over(x_BTM, 2)
    table_VD = readout(self.encoder.embed_VD[...], self.c.width())
    return sharding.use(table_VD, "VD", dtype, over), self.output_bias_V[...]

  def next_sentence(self, x_BTD) -> jax.Array:
    """Logits (B, 2) float32 that a row's second text follows its first (0), or does not (1)."""
    pooled_BM = readout(self.encoder.pooled(x_BTD), self.c.width())
    return project("BM,MC->BC", pooled_BM, self.next_MC, self.next_bias_C).astype(jnp.float32)


@config
class TextClassifierConfig(ModelConfig):
  """An encoder that tells the class of a row of text, for fine-tuning."""

  encoder: EncoderConfig
  classes: int  # How many.
  dropout: float = 0.1  # Of the pooled row.

  def make(self, key: jax.Array) -> "TextClassifier":
    return TextClassifier(self, key)

  def dims(self) -> dict[str, tuple[str, int]]:
    return _dims(self.encoder)

  def width(self) -> Width | None:
    return self.encoder.width()

  def flops(self, length: int = 1) -> float:
    e = self.encoder
    return e.flops(length) + 6 * e.dim * (e.dim + self.classes)

  def vocabulary(self) -> int:
    return self.encoder.vocab

  def cuts_rows(self) -> bool:
    return True

  def longest_row(self) -> int | None:
    return self.encoder.longest_row()

  def n_token_types(self) -> int:
    return self.encoder.token_types

  def n_classes(self) -> int:
    return self.classes

  def check(self) -> None:
    if self.classes < 2:
      raise Refused(f"model: classes is {self.classes}; there are at least 2")
    if not 0 <= self.dropout < 1:
      raise Refused(f"model: dropout is {self.dropout}; it is a rate, from 0 to below 1")


class TextClassifier(nnx.Module):
  def __init__(self, c: TextClassifierConfig, key: jax.Array):
    self.c = c
    ke, kc = jax.random.split(key)
    init = Initializer(c.encoder.init, c.encoder.layers, c.width())
    sizes = {"M": c.encoder.dim, "C": c.classes}
    self.encoder = Encoder(c.encoder, ke)
    self.classes_MC = init.weight(kc, "MC", sizes, fan_in="M")
    self.classes_bias_C = init.constant("C", sizes)

  def __call__(
    self, tokens_BT, positions_BT=None, segments_BT=None, types_BT=None, key=None
  ) -> jax.Array:
    """Logits (B, C) float32 of each row's classes; arguments as in Encoder."""
    ke, kd = (None, None) if key is None else jax.random.split(key)
    with taps.named("encoder"):
      x_BTD = self.encoder(tokens_BT, positions_BT, segments_BT, types_BT, ke)
    pooled_BM = dropout(self.encoder.pooled(x_BTD), self.c.dropout, kd)
    pooled_BM = readout(pooled_BM, self.c.width())
    logits_BC = project("BM,MC->BC", pooled_BM, self.classes_MC, self.classes_bias_C)
    return logits_BC.astype(jnp.float32)

  def logits(self, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    """The same of a batch of labelled text; a key means training."""
    rows = batch["tokens"], None, batch["segments"], batch["token_types"]
    return self(*rows, key)


def _dims(encoder: EncoderConfig) -> dict[str, Any]:
  return {f"encoder.{name}": dim for name, dim in encoder.dims().items()}
