"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of a narrow latent.

Positions turn a part of each query and one key that all heads share; the rest of keys, and the
values, are products of a latent vector for each token. While sampling, keys and values are cached
as they are attended to, not as the latent.

Dims: B batch, T query position, S key position, D model, K heads, G one query per head, H all of a
head's query or key, N its part without position, P its part with position, U its value, L latent.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.kernels.attention import Call, Form, Tokens, attend
from bigtrain.models.initial import Initializer
from bigtrain.models.norm import NormConfig, RMSNormConfig
from bigtrain.models.position import Rotary, rotate
from bigtrain.precision import project


@config
class LatentAttentionConfig:
  """Heads whose keys and values come of one narrow vector for each token."""

  heads: int
  kv_rank: int  # Width of the latent of keys and values.
  head_dim: int  # Of each head's query and key, without the part that has positions.
  rotary_dim: int  # Of the part that has positions.
  value_dim: int  # Of each head's value, at most head_dim + rotary_dim.
  q_rank: int | None = None  # Width of the latent of queries; None makes them of the input.
  causal: bool = True  # A position sees itself and what is before it.
  rotary: Rotary = dataclasses.field(default_factory=Rotary)
  norm: NormConfig = dataclasses.field(default_factory=RMSNormConfig)  # Of both latents.
  dropout: float = 0.0  # Of attention weights.

  def sizes(self, dim: int) -> dict[str, int]:
    """The letters of the weights and their sizes, and K, G and H of what is attended to."""
    whole = self.head_dim + self.rotary_dim
    parts = {"N": self.head_dim, "P": self.rotary_dim, "U": self.value_dim, "L": self.kv_rank}
    return {"D": dim, "K": self.heads, "G": 1, "H": whole} | parts

  def dims(self) -> dict[str, tuple[str, int]]:
    """As in ModelConfig: what the mesh must divide."""
    ranks = {"kv_rank": self.kv_rank} | ({"q_rank": self.q_rank} if self.q_rank else {})
    return {"heads": ("K", self.heads)} | {name: ("L", rank) for name, rank in ranks.items()}

  def flops(self, dim: int, length: int) -> float:
    """Training FLOPs of one row: 6 a weight and token, and attention's two products."""
    s = self.sizes(dim)
    rank, kv_rank = self.q_rank or 0, self.kv_rank
    q = dim * rank + (rank or dim) * self.heads * s["H"]
    kv = dim * (kv_rank + s["P"]) + kv_rank * self.heads * (s["N"] + s["U"])
    weights = q + kv + self.heads * s["U"] * dim
    seen = length / 2 if self.causal else length
    return length * (6 * weights + 6 * self.heads * (s["H"] + s["U"]) * seen)

  def check(self) -> None:
    for name in ("heads", "kv_rank", "head_dim", "rotary_dim", "value_dim", "q_rank"):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise Refused(f"attention: {name} is {value}; it must be positive")
    if self.rotary_dim % 2:
      raise Refused(f"attention: rotary positions need an even rotary_dim, not {self.rotary_dim}")
    if self.value_dim > (whole := self.head_dim + self.rotary_dim):
      raise Refused(f"attention: value_dim is {self.value_dim}; it is at most {whole}, the key's")
    if not 0 <= self.dropout < 1:
      raise Refused(f"attention: dropout is {self.dropout}; it is a rate, from 0 to below 1")

  def check_dim(self, dim: int) -> None:
    """Refuses what cannot be; it fits a model of any width."""
    del dim
    self.check()

  def make(self, dim: int, init: Initializer, key: jax.Array) -> "LatentAttention":
    return LatentAttention(self, dim, init, key)


class LatentAttention(nnx.Module):
  def __init__(self, c: LatentAttentionConfig, dim: int, init: Initializer, key: jax.Array):
    self.c, sizes = c, c.sizes(dim)
    kd, kq, kc, kp, kk, kv, ko = jax.random.split(key, 7)
    rank = c.q_rank
    of_q = sizes | {"L": rank or dim}
    self.q_down_DL = init.weight(kd, "DL", of_q, fan_in="D") if rank else None
    self.q_norm = c.norm.make(rank) if rank else None
    self.q_LKGH = init.weight(kq, "LKGH", of_q, fan_in="L")  # Without a latent L is D.
    self.kv_down_DL = init.weight(kc, "DL", sizes, fan_in="D")
    self.kv_norm = c.norm.make(c.kv_rank)
    self.shared_k_DP = init.weight(kp, "DP", sizes, fan_in="D")
    self.k_LKN = init.weight(kk, "LKN", sizes, fan_in="L")
    self.v_LKU = init.weight(kv, "LKU", sizes, fan_in="L")
    self.o_KUD = init.residual(ko, "KUD", sizes, fan_in="KU")
    self.score_scale = sizes["H"] ** -0.5

  def __call__(self, x_BTD, tokens: Tokens, key=None, cache=None, bias_KGP=None):
    """As Attention's: the output (B, T, D), and the cache with the keys and values of `tokens`."""
    q_BTKGH, (k_BSKH, v_BSKH) = self._queries(x_BTD, tokens), self._keys_values(x_BTD, tokens)
    keys = tokens
    if cache is not None:
      cache = cache.extended(k_BSKH, v_BSKH)
      k_BSKH, v_BSKH, keys = cache.k_BSKH, cache.v_BSKH, cache.tokens
    form = Form(causal=self.c.causal)
    call = Call(q_BTKGH, k_BSKH, v_BSKH, tokens, keys, form, bias_KGP, self.c.dropout, key)
    y_BTKU = attend(call)[:, :, :, 0, : self.c.value_dim]  # What is kept is what it is a slice of.
    return project("BTKU,KUD->BTD", y_BTKU, self.o_KUD), cache

  def _queries(self, x_BTD, tokens: Tokens) -> jax.Array:
    q_BTL = x_BTD
    if self.q_norm is not None:
      q_BTL = self.q_norm(project("BTD,DL->BTL", x_BTD, self.q_down_DL))
    q_BTKGH = project("BTL,LKGH->BTKGH", sharding.shared(q_BTL), self.q_LKGH)
    still, turned = jnp.split(q_BTKGH, [self.c.head_dim], axis=-1)
    turned = rotate(self.c.rotary, turned, tokens.positions)
    return jnp.concatenate([still, turned], axis=-1) * self.score_scale

  def _keys_values(self, x_BSD, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """(B, S, K, H) each: values have zeros behind, so that both are of one width."""
    latent_BSL = self.kv_norm(project("BSD,DL->BSL", x_BSD, self.kv_down_DL))
    latent_BSL = sharding.shared(latent_BSL)
    still_BSKN = project("BSL,LKN->BSKN", latent_BSL, self.k_LKN)
    v_BSKU = project("BSL,LKU->BSKU", latent_BSL, self.v_LKU)
    turned_BSP = project("BSD,DP->BSP", x_BSD, self.shared_k_DP)
    # Not gathered yet: its positions lie as the residual stream's.
    positions_BS = sharding.lay(tokens.positions[..., None], "BSP")[..., 0]
    turned_BSP = sharding.shared(rotate(self.c.rotary, turned_BSP, positions_BS))
    shape = (*still_BSKN.shape[:3], self.c.rotary_dim)
    turned_BSKP = jax.lax.broadcast_in_dim(
      turned_BSP, shape, (0, 1, 3), out_sharding=sharding.act("BSKP")
    )
    k_BSKH = jnp.concatenate([still_BSKN, turned_BSKP], axis=-1)
    v_BSKH = jnp.pad(v_BSKU, ((0, 0),) * 3 + ((0, k_BSKH.shape[-1] - v_BSKU.shape[-1]),))
    return k_BSKH, v_BSKH
