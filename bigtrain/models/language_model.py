"""A decoder language model: embedding, transformer, logits.

Dims: B batch, T position, D model, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.experiment import ModelConfig
from bigtrain.kernels.attention import Tokens
from bigtrain.models.initial import Initializer
from bigtrain.models.position import Learned, Sinusoidal, lookup, sinusoid
from bigtrain.models.transformer import Cache, Transformer, TransformerConfig
from bigtrain.parallel.context import before
from bigtrain.precision import Dtype, compute_dtype, raised
from bigtrain.width import readout


@config
class LanguageModelConfig(TransformerConfig, ModelConfig):
  """A transformer between a vocabulary and itself."""

  vocab: int  # Tokens; must be what the tokenizer has, or more.
  position: Learned | Sinusoidal | None = None  # Added to the embedding; rotations are attention's.
  # Adds to each embedding a learned share, channel by channel, of that of the token before it in
  # the document (RWKV's token shift, arXiv:2305.13048), so that no head need learn to fetch it.
  shift: bool = False
  tied: bool = True  # The output table is the embedding.
  dtype: Dtype = "auto"  # Of activations: bfloat16 on accelerators, float32 on CPU.

  def make(self, key: jax.Array) -> "LanguageModel":
    return LanguageModel(self, key)

  def dims(self) -> dict[str, tuple[str, int]]:
    return TransformerConfig.dims(self) | {"vocab": ("V", self.vocab)}

  def flops(self, length: int = 1) -> float:
    return TransformerConfig.flops(self, length) + 6 * length * self.dim * self.vocab

  def vocabulary(self) -> int:
    return self.vocab

  def cuts_rows(self) -> bool:
    return True

  def longest_row(self) -> int | None:
    return self.position.length if isinstance(self.position, Learned) else None

  def check(self) -> None:
    TransformerConfig.check(self)
    if self.vocab < 1:
      raise Refused(f"model: vocab is {self.vocab}; it must be positive")
    if isinstance(self.position, Sinusoidal) and self.dim % 2:
      raise Refused(f"model: sinusoidal positions need an even dim, not {self.dim}")


class LanguageModel(nnx.Module):
  continues = True  # What is sampled follows the prompt.

  def __init__(self, c: LanguageModelConfig, key: jax.Array):
    self.c = c
    init = Initializer(c.init, c.layers, c.width())
    ke, kp, kt, ko = jax.random.split(key, 4)
    learned = c.position if isinstance(c.position, Learned) else None
    sizes = {"V": c.vocab, "D": c.dim, "T": learned.length if learned else 0}
    self.embed_VD = init.weight(ke, "VD", sizes, fan_in="D")
    self.position_TD = init.weight(kp, "TD", sizes, fan_in="D") if learned else None
    self.shift_scale_D = init.constant("D", sizes) if c.shift else None
    self.transformer = Transformer(c, kt)
    self.norm = None if c.norm_placement == "post" else c.norm.make(c.dim)
    self.output_table_VD = None if c.tied else init.weight(ko, "VD", sizes, fan_in="D")

  def __call__(self, tokens_BT, positions_BT=None, segments_BT=None, key=None) -> jax.Array:
    """Logits (B, T, V) float32 of the token after each position.

    Args:
      tokens_BT: token ids; also a list of equally long lists.
      positions_BT: position of each token in its document; by default a row is one document.
      segments_BT: the document of each token within its row; attention stays within it.
      key: dropout's key; None (no dropout) outside training.

    Raises:
      Refused: text, or what cannot be token ids of this model.
    """
    tokens_BT = _token_ids(tokens_BT, self.c)
    return self.logits(self.hidden(tokens_BT, positions_BT, segments_BT, key))

  def hidden(self, tokens_BT, positions_BT=None, segments_BT=None, key=None) -> jax.Array:
    """The normalised last hidden state (B, T, D), in the compute dtype."""
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return self._run(tokens_BT, Tokens(positions_BT, segments_BT), key, None)[0]

  def decode(self, tokens_BT, positions_BT, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits (B, T, V) of tokens that follow what the cache holds, and the extended cache.

    A negative position marks padding: nothing attends to it.
    """
    x_BTD, cache = self._run(tokens_BT, Tokens(positions_BT), None, cache)
    return self.logits(x_BTD), cache

  def begin(self, tokens_BT, positions_BT, length: int) -> tuple[jax.Array, jax.Array, Cache]:
    """Reads prompts, of which `length` tokens at most will be sampled.

    Returns:
      The tokens that the first sampled ones follow, (B,), their positions, and what comes before
      them as a cache for `decode`.
    """
    B, T = tokens_BT.shape
    _, cache = self.decode(tokens_BT[:, :-1], positions_BT[:, :-1], self.cache(B, T - 1 + length))
    return tokens_BT[:, -1], positions_BT[:, -1], cache

  def cache(self, batch: int, length: int) -> Cache:
    """An empty key-value cache for `decode`."""
    dtype = compute_dtype(self.c.dtype)
    cache = self.transformer.cache(batch, length, dtype)
    if self.c.shift:
      before_B1D = jnp.zeros((batch, 1, self.c.dim), dtype, out_sharding=sharding.act("BTD"))
      cache = dataclasses.replace(cache, embed_B1D=before_B1D)
    return cache

  def logits(self, x_BTD) -> jax.Array:
    """Logits (B, T, V) float32 of a hidden state."""
    wide = raised(x_BTD.dtype)
    return jnp.einsum("btd,vd->btv", x_BTD, self.output_VD(x_BTD), preferred_element_type=wide)

  def output_VD(self, x_BTD) -> jax.Array:
    """The table whose products with a hidden state are its logits: gathered, compute dtype."""
    table_VD = self.embed_VD if self.output_table_VD is None else self.output_table_VD
    over = sharding.split_over(x_BTD, 2)
    table_VD = readout(table_VD[...], self.c.width())
    return sharding.use(table_VD, "VD", compute_dtype(self.c.dtype), over)

  def _run(self, tokens_BT, tokens: Tokens, key, cache: Cache | None) -> tuple[jax.Array, Any]:
    dtype = compute_dtype(self.c.dtype)
    kd, kt = (None, None) if key is None else jax.random.split(key)
    with jax.named_scope("embed"):
      x_BTD = lookup(self.embed_VD, tokens_BT, dtype)
      x_BTD, cache = self._shifted(x_BTD, tokens, cache)
      if self.position_TD is not None:
        x_BTD += lookup(self.position_TD, tokens.positions, dtype)
      elif isinstance(self.c.position, Sinusoidal):
        waves_BTD = sinusoid(self.c.position, tokens.positions, self.c.dim).astype(dtype)
        x_BTD += sharding.lay(waves_BTD, "BTD")
      x_BTD = dropout(x_BTD, self.c.dropout, kd)
    with taps.named("transformer"):
      x_BTD, cache = self.transformer(x_BTD, tokens, kt, cache)
    return (x_BTD if self.norm is None else self.norm(x_BTD)), cache

  def _shifted(self, x_BTD, tokens: Tokens, cache: Cache | None) -> tuple[jax.Array, Any]:
    """Embeddings with their share of the one before; a cache keeps the last for what follows."""
    if self.shift_scale_D is None:
      return x_BTD, cache
    if cache is None:
      before_BTD = before(x_BTD)
    else:
      before_BTD = jnp.concatenate([cache.embed_B1D, x_BTD[:, :-1]], axis=1)
      cache = dataclasses.replace(cache, embed_B1D=x_BTD[:, -1:])
    before_BTD *= sharding.lay((tokens.positions > 0)[..., None], "BTD")
    return x_BTD + self.shift_scale_D[...].astype(x_BTD.dtype) * before_BTD, cache


def _token_ids(tokens_BT: Any, c: LanguageModelConfig) -> jax.Array:
  """The ids as an array; the messages are for people who call a model by hand."""
  if not isinstance(tokens_BT, jax.Array):
    try:
      tokens_BT = np.asarray(tokens_BT)
    except ValueError:
      raise Refused(
        "rows of one call must have equally many tokens; pad the shorter ones"
      ) from None
    if tokens_BT.dtype.kind in "US":
      raise Refused("the model takes token ids, not text: run.model([run.tokenizer.encode(text)])")
    if tokens_BT.size and not 0 <= tokens_BT.min() <= tokens_BT.max() < c.vocab:
      raise Refused(
        f"token ids are from 0 to {c.vocab - 1}, not {tokens_BT.min()} to {tokens_BT.max()}"
      )
  if not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
    raise Refused(f"token ids are integers, not {tokens_BT.dtype}")
  if tokens_BT.ndim != 2:
    raise Refused(
      f"the model takes rows of token ids, (B, T), not {tokens_BT.shape}; for one row: [ids]"
    )
  if tokens_BT.shape[0] % (shards := sharding.axis_size("B")):
    raise Refused(
      f"{tokens_BT.shape[0]} rows do not divide over the mesh: give a multiple of {shards}"
    )
  return jnp.asarray(tokens_BT)
