"""Attention: multi-head and grouped-query, with the variations that published models use.

Dims: B batch, T query position, S key position, D model, K kv heads, G queries per kv head, H head.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.kernels.attention import Call, Form, Kernel, Tokens, attend, refuse
from bigtrain.kernels.fence import fence
from bigtrain.models.initial import Initializer
from bigtrain.models.norm import NormConfig
from bigtrain.models.position import Rotary, rotate
from bigtrain.precision import project


@config
class AttentionConfig:
  """Attention of grouped queries (arXiv:2305.13245); by default each head has its own key."""

  heads: int  # Query heads.
  kv_heads: int | None = None  # Key-value heads, a divisor of `heads`; None for as many.
  head_dim: int | None = None  # None for the model's dim / heads.
  causal: bool = True  # A position sees itself and what is before it.
  window: int | None = None  # Positions seen, itself included; None for all.
  # Scores are scaled by head_dim**-0.5; where not, the initial queries are (T5, arXiv:1910.10683).
  scaled: bool = True
  rotary: Rotary | None = None  # Rotates q and k by their positions.
  qk_norm: NormConfig | None = None  # Normalises each head of q and k (arXiv:2010.04245).
  softcap: float | None = None  # Scores are squashed to this magnitude by tanh.
  bias: bool = False  # On the q, k and v products.
  out_bias: bool = False  # On the output product.
  dropout: float = 0.0  # Of attention weights.
  kernel: Kernel = "auto"  # What computes it: the best for the chip that can, or the one named.

  def sizes(self, dim: int) -> dict[str, int]:
    """The letters of the weights and their sizes."""
    kv_heads = self.kv_heads or self.heads
    head_dim = self.head_dim or dim // self.heads
    return {"D": dim, "K": kv_heads, "G": self.heads // kv_heads, "H": head_dim}

  def form(self) -> Form:
    """What of it concerns scores."""
    return Form(self.causal, self.window, self.softcap, kernel=self.kernel)

  def dims(self) -> dict[str, tuple[str, int]]:
    """As in ModelConfig: what the mesh must divide."""
    name = "heads" if self.kv_heads is None else "kv_heads"
    return {name: ("K", self.kv_heads or self.heads)}

  def flops(self, dim: int, length: int) -> float:
    """Training FLOPs of one row: 6 a weight and token, and attention's two products.

    A causal query sees half of the row on average; a window that is shorter limits that.
    """
    s = self.sizes(dim)
    heads = s["K"] * s["G"]
    weights = dim * s["H"] * (2 * heads + 2 * s["K"])
    seen = min(length / 2 if self.causal else length, self.window or length)
    return length * (6 * weights + 12 * heads * s["H"] * seen)

  def check(self) -> None:
    for name in ("heads", "kv_heads", "head_dim", "window", "softcap"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise Refused(f"attention: {name} is {value}; it must be positive")
    if self.kv_heads is not None and self.heads % self.kv_heads:
      raise Refused(f"attention: {self.heads} heads are not divisible by kv_heads={self.kv_heads}")
    if not 0 <= self.dropout < 1:
      raise Refused(f"attention: dropout is {self.dropout}; it is a rate, from 0 to below 1")
    refuse(self.form(), self.dropout)

  def check_dim(self, dim: int) -> None:
    """Refuses what cannot be, or does not fit a model of that width."""
    self.check()
    if self.head_dim is None and dim % self.heads:
      raise Refused(
        f"attention: dim {dim} is not divisible by {self.heads} heads; set head_dim, or a "
        f"number of heads that divides {dim}"
      )
    if self.rotary is not None and (head_dim := self.sizes(dim)["H"]) % 2:
      raise Refused(f"attention: rotary positions need an even head_dim, not {head_dim}")

  def make(self, dim: int, init: Initializer, key: jax.Array) -> "Attention":
    return Attention(self, dim, init, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """What a decoder attends to besides itself: an encoder's output, or keys and values of it."""

  tokens: Tokens
  x_BSD: jax.Array | None = None
  # Of a layer (k, v), (B, S, K, H) each; of a stack these by [segment][block], with the repeats in
  # front. None where they are made of `x_BSD`.
  pairs: Any = None


class Attention(nnx.Module):
  def __init__(self, c: AttentionConfig, dim: int, init: Initializer, key: jax.Array):
    self.c = c
    kq, kk, kv, ko = jax.random.split(key, 4)
    sizes = c.sizes(dim)
    self.q_DKGH = init.weight(kq, "DKGH", sizes, fan_in="D" if c.scaled else "DH")
    self.k_DKH = init.weight(kk, "DKH", sizes, fan_in="D")
    self.v_DKH = init.weight(kv, "DKH", sizes, fan_in="D")
    self.o_KGHD = init.residual(ko, "KGHD", sizes, fan_in="KGH")
    self.q_bias_KGH = init.constant("KGH", sizes) if c.bias else None
    self.k_bias_KH = init.constant("KH", sizes) if c.bias else None
    self.v_bias_KH = init.constant("KH", sizes) if c.bias else None
    self.o_bias_D = init.constant("D", sizes) if c.out_bias else None
    self.score_scale = sizes["H"] ** -0.5 * (init.width.scores() if init.width else 1.0)
    self.q_norm = c.qk_norm.make(sizes["H"]) if c.qk_norm else None
    self.k_norm = c.qk_norm.make(sizes["H"]) if c.qk_norm else None

  def __call__(self, x_BTD, tokens: Tokens, key=None, cache=None, bias_KGP=None):
    """Attends within `tokens`, or, with a cache, to all that it holds and these.

    Returns:
      The output (B, T, D), and the cache with the keys and values of `tokens` (None without one).
    """
    x_BTD = sharding.shared(x_BTD)
    q_BTKGH, (k_BSKH, v_BSKH) = self._queries(x_BTD, tokens), self.keys_values(x_BTD, tokens)
    keys = tokens
    if cache is not None:
      cache = cache.extended(k_BSKH, v_BSKH)
      k_BSKH, v_BSKH, keys = cache.k_BSKH, cache.v_BSKH, cache.tokens
    form = self.c.form()._replace(aligned=cache is None)
    call = Call(q_BTKGH, k_BSKH, v_BSKH, tokens, keys, form, bias_KGP, self.c.dropout, key)
    return self._output(attend(call)), cache

  def across(self, x_BTD, tokens: Tokens, memory: Memory, key=None) -> jax.Array:
    """Attends to a memory: to what is of the same document there. Returns (B, T, D)."""
    k_BSKH, v_BSKH = memory.pairs or self.keys_values(sharding.shared(memory.x_BSD), memory.tokens)
    q_BTKGH = self._queries(sharding.shared(x_BTD), tokens)
    form = self.c.form()._replace(causal=False, window=None)
    call = Call(q_BTKGH, k_BSKH, v_BSKH, tokens, memory.tokens, form, None, self.c.dropout, key)
    return self._output(attend(call))

  def _output(self, y_BTKGH) -> jax.Array:
    y_BTD = project("BTKGH,KGHD->BTD", y_BTKGH, self.o_KGHD, self.o_bias_D)
    return fence(y_BTD, self.o_KGHD, "KGHD")

  def _queries(self, x_BTD, tokens: Tokens) -> jax.Array:
    q_BTKGH = project("BTD,DKGH->BTKGH", x_BTD, self.q_DKGH, self.q_bias_KGH)
    if self.q_norm is not None:
      q_BTKGH = self.q_norm(q_BTKGH)
    scale = self.score_scale if self.c.scaled else 1.0
    if self.c.rotary is not None:
      return rotate(self.c.rotary, q_BTKGH, tokens.positions, scale)
    return q_BTKGH * scale

  def keys_values(self, x_BSD, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """What can be attended to, (B, S, K, H) each."""
    k_BSKH = project("BSD,DKH->BSKH", x_BSD, self.k_DKH, self.k_bias_KH)
    v_BSKH = project("BSD,DKH->BSKH", x_BSD, self.v_DKH, self.v_bias_KH)
    if self.k_norm is not None:
      k_BSKH = self.k_norm(k_BSKH)
    if self.c.rotary is not None:
      k_BSKH = rotate(self.c.rotary, k_BSKH, tokens.positions)
    return k_BSKH, v_BSKH
