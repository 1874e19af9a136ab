"""The vision transformer (Dosovitskiy 2020, arXiv:2010.11929): images cut into patches, classified.

Dims: B batch, R image row, S image column, P pixels and channels of a patch, T patch (and the class
token before them, where there is one), Q the one query of the pooling, D model, K kv heads,
G queries per kv head, H head, C classes (of an image: channels).
"""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.experiment import ModelConfig
from bigtrain.hints import to_set
from bigtrain.kernels.attention import Call, Tokens, attend
from bigtrain.models.activation import ActivationName
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer, Mup
from bigtrain.models.norm import NormConfig
from bigtrain.models.transformer import BlockConfig, Transformer, TransformerConfig
from bigtrain.precision import Dtype, compute_dtype, project
from bigtrain.width import readout

SMOKE_SIDE = 8  # Patches along each side of an image at most, with --smoke.
WAVELENGTH = 10_000.0  # The longest of the fixed positions, over 2 pi patches (arXiv:2205.01580).


@config
class AttentionPoolConfig:
  """One learned query attends to all patches; a network follows (arXiv:2106.04560)."""

  heads: int
  hidden: int  # Units of the network.
  activation: ActivationName = "gelu"  # Of the network.
  bias: bool = True  # On every product.

  def attention(self) -> AttentionConfig:
    return AttentionConfig(heads=self.heads, causal=False, bias=self.bias, out_bias=self.bias)

  def feed_forward(self) -> FeedForwardConfig:
    return FeedForwardConfig(hidden=self.hidden, activation=self.activation, bias=self.bias)

  def check(self) -> None:
    self.feed_forward().check()

  def flops(self, dim: int, length: int) -> float:
    """Training FLOPs on one image of `length` patches; the query is of one token."""
    return 6.0 * dim * (2 * dim * (1 + length) + 2 * self.hidden) + 12.0 * dim * length


@config
class ViTConfig(TransformerConfig, ModelConfig):
  """A transformer over the patches of square images; its blocks should not be causal."""

  image: int = 224  # Pixels of height and width.
  channels: int = 3
  patch: int  # Pixels of height and width.
  classes: int = 1000
  # What the classes are read from: a `token` of its own (the original), the `mean` of the patches
  # (arXiv:2205.01580), or what a query finds in them.
  pool: Literal["token", "mean"] | AttentionPoolConfig = "token"
  position: Literal["learned", "sincos"] = (
    "learned"  # `sincos`: fixed waves along rows and columns.
  )
  dtype: Dtype = "auto"  # Of activations: bfloat16 on accelerators, float32 on CPU.

  def make(self, key: jax.Array) -> "ViT":
    return ViT(self, key)

  def patches(self) -> int:
    return (self.image // self.patch) ** 2

  def tokens(self) -> int:
    """Positions of the transformer, T."""
    return self.patches() + (self.pool == "token")

  def n_classes(self) -> int:
    return self.classes

  def check_inputs(self, shape: tuple[int, ...]) -> None:
    height, width, channels = shape if len(shape) == 3 else (0, 0, 0)
    if (height, width, channels) != (self.image, self.image, self.channels):
      remedy = "give ImageData, whose examples are (height, width, channels)"
      if height == width > 0:
        image, colours = to_set("model.image", height), to_set("model.channels", channels)
        remedy = f"set {image} and {colours}, or the data's"
      raise Refused(
        f"the model takes images of {self.image}x{self.image} pixels and {self.channels} channels, "
        f"not {tuple(shape)}; {remedy}"
      )

  def smoke(self) -> Self:
    """Coarser patches: the images stay those of the data, and attention sees few of them."""
    fit = (n for n in range(self.patch, self.image) if self.image % n == 0)
    few = (n for n in fit if self.image // n <= SMOKE_SIDE)
    return dataclasses.replace(self, patch=next(few, self.image))

  def flops(self, length: int = 1) -> float:
    embed = self.patches() * self.patch**2 * self.channels
    flops = TransformerConfig.flops(self, self.tokens()) + 6.0 * self.dim * (embed + self.classes)
    if isinstance(self.pool, AttentionPoolConfig):
      flops += self.pool.flops(self.dim, self.tokens())
    return flops

  def dims(self) -> dict[str, tuple[str, int]]:
    dims = TransformerConfig.dims(self)
    if isinstance(self.pool, AttentionPoolConfig):
      dims |= {"pool.heads": ("K", self.pool.heads), "pool.hidden": ("F", self.pool.hidden)}
    return dims

  def check(self) -> None:
    TransformerConfig.check(self)
    for name in ("image", "channels", "patch", "classes"):
      if getattr(self, name) < 1:
        raise Refused(f"model: {name} is {getattr(self, name)}; it must be positive")
    if self.image % self.patch:
      below = self.image // self.patch * self.patch
      raise Refused(
        f"model: patches of {self.patch} pixels do not divide images of {self.image}; "
        f"take images of {below or self.patch} or {below + self.patch}"
      )
    if self.position == "sincos" and self.dim % 4:
      raise Refused(f"model: sincos positions need a dim divisible by 4, not {self.dim}")
    if isinstance(self.pool, AttentionPoolConfig):
      self.pool.attention().check_dim(self.dim)
      if isinstance(self.init, Mup):
        pool = BlockConfig(attention=self.pool.attention(), feed_forward=self.pool.feed_forward())
        self._check_growth(self.init, pool)
    blocks = (*self.first, *self.pattern)
    if any(block.attention.causal for block in blocks):
      raise Refused(
        "model: the patches of an image have no order; set the attention's causal=False"
      )


class ViT(nnx.Module):
  def __init__(self, c: ViTConfig, key: jax.Array):
    self.c = c
    init = Initializer(c.init, c.layers, c.width())
    ke, kc, kp, kt, km, kh = jax.random.split(key, 6)
    sizes = {"P": c.patch**2 * c.channels, "D": c.dim, "T": c.tokens(), "C": c.classes, "Q": 1}
    self.patch_PD = init.weight(ke, "PD", sizes, fan_in="P")
    self.patch_bias_D = init.constant("D", sizes)
    self.class_QD = init.weight(kc, "QD", sizes, fan_in="D") if c.pool == "token" else None
    learned = c.position == "learned"
    self.position_TD = init.weight(kp, "TD", sizes, fan_in="D") if learned else None
    self.transformer = Transformer(c, kt)
    self.norm = c.norm.make(c.dim)
    pool = c.pool if isinstance(c.pool, AttentionPoolConfig) else None
    self.pool = AttentionPool(pool, c.dim, c.norm, init, km) if pool else None
    self.head_DC = init.weight(kh, "DC", sizes, fan_in="D")
    self.head_bias_C = init.constant("C", sizes)

  def __call__(self, images_BRSC) -> jax.Array:
    """Logits (B, C) float32 of images (B, height, width, channels), without dropout."""
    return self.logits(jnp.asarray(images_BRSC), None)

  def logits(self, images_BRSC: jax.Array, key: jax.Array | None) -> jax.Array:
    """A score for each class, (B, C) float32; a key means training.

    Raises:
      Refused: the images are of another size than the model's.
    """
    x_BD = readout(self.pooled(images_BRSC, key), self.c.width())
    return project("BD,DC->BC", x_BD, self.head_DC, self.head_bias_C).astype(jnp.float32)

  def pooled(self, images_BRSC: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """What the classes are read from, (B, D), in the compute dtype."""
    kd, kt = (None, None) if key is None else jax.random.split(key)
    with jax.named_scope("embed"):
      x_BTD = dropout(self._embedded(images_BRSC), self.c.dropout, kd)
    B, T, _ = x_BTD.shape
    none_B = jnp.zeros((B, 1), jnp.int32, out_sharding=sharding.act("BT"))
    with taps.named("transformer"):
      x_BTD, _ = self.transformer(x_BTD, Tokens(none_B + jnp.arange(T)), kt)
    x_BTD = self.norm(x_BTD)
    with jax.named_scope("pool"), taps.named("pool"):
      if self.pool is not None:
        return self.pool(x_BTD)
      return x_BTD[:, 0] if self.c.pool == "token" else x_BTD.mean(1)

  def _embedded(self, images_BRSC: jax.Array) -> jax.Array:
    c, dtype = self.c, compute_dtype(self.c.dtype)
    c.check_inputs(images_BRSC.shape[1:])
    x_BTP = patches(images_BRSC, c.patch).astype(dtype)
    x_BTD = project("BTP,PD->BTD", x_BTP, self.patch_PD, self.patch_bias_D)
    if self.position_TD is not None:
      position_TD = sharding.use(self.position_TD, "TD", dtype)
    else:
      position_TD = waves(c.image // c.patch, c.dim).astype(dtype)
    if self.class_QD is not None:
      # The token's place, whose fixed position is 0, comes first.
      before = c.tokens() - len(position_TD)
      position_TD = jnp.pad(position_TD, ((before, 0), (0, 0)))
      position_TD = position_TD.at[0].add(sharding.use(self.class_QD, "QD", dtype)[0])
      x_BTD = jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))
    return x_BTD + position_TD


class AttentionPool(nnx.Module):
  """Lee 2018, arXiv:1810.00825, with one query."""

  def __init__(
    self, c: AttentionPoolConfig, dim: int, norm: NormConfig, init: Initializer, key: jax.Array
  ):
    ka, kq, kf = jax.random.split(key, 3)
    self.query_QD = init.weight(kq, "QD", {"Q": 1, "D": dim}, fan_in="D")
    self.attention = c.attention().make(dim, init, ka)
    self.norm = norm.make(dim)
    self.feed_forward = c.feed_forward().make(dim, init, kf)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """What the query found, (B, D)."""
    a, (B, T, D) = self.attention, x_BTD.shape
    query_BTD = jnp.zeros((B, 1, D), x_BTD.dtype, out_sharding=sharding.act("BTD"))
    query_BTD += sharding.use(self.query_QD, "QD", x_BTD.dtype)
    q_BTKGH = project("BTD,DKGH->BTKGH", query_BTD, a.q_DKGH, a.q_bias_KGH)
    k_BSKH = project("BSD,DKH->BSKH", x_BTD, a.k_DKH, a.k_bias_KH)
    v_BSKH = project("BSD,DKH->BSKH", x_BTD, a.v_DKH, a.v_bias_KH)
    at = lambda n: Tokens(jnp.zeros((B, n), jnp.int32, out_sharding=sharding.act("BT")))
    call = Call(q_BTKGH * a.score_scale, k_BSKH, v_BSKH, at(1), at(T), a.c.form())
    y_BTKGH = attend(call)
    x_BTD = project("BTKGH,KGHD->BTD", y_BTKGH, a.o_KGHD, a.o_bias_D)
    return (x_BTD + self.feed_forward(self.norm(x_BTD)))[:, 0]


def patches(images_BRSC: jax.Array, size: int) -> jax.Array:
  """Square patches from left to right and top to bottom, (B, T, P); P is row, column, channel."""
  B, R, S, C = images_BRSC.shape
  shape = (B, R // size, size, S // size, size, C)
  x = jnp.reshape(images_BRSC, shape, out_sharding=sharding.act("BRPSPC"))
  x = jnp.transpose(x, (0, 1, 3, 2, 4, 5))
  T, P = shape[1] * shape[3], size * size * C
  return jnp.reshape(x, (B, T, P), out_sharding=sharding.act("BTP"))


def waves(side: int, dim: int) -> jax.Array:
  """(T, D) float32 of side * side patches: sine and cosine of the column, then of the row."""
  freq = WAVELENGTH ** (-jnp.arange(dim // 4) / (dim // 4 - 1 or 1))
  row_T, column_T = jnp.divmod(jnp.arange(side**2), side)
  angles = [x_T[:, None] * freq for x_T in (column_T, row_T)]
  return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=-1)
