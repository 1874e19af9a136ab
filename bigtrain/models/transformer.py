"""The stack of blocks: a pattern of blocks repeated over the depth, scanned segment by segment.

Dims: B batch, T position, S cached position, D model, K kv heads, G queries per kv head, H head, P
distance, R relative bucket. Stacked parameters and caches of keys and values have one more dim in
front, the repeats of their segment.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.dropout import dropout
from bigtrain.kernels.attention import Tokens
from bigtrain.models import remat
from bigtrain.models.attention import AttentionConfig, Memory
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import FanIn, Initializer, Mup, Normal
from bigtrain.models.latent_attention import LatentAttentionConfig
from bigtrain.models.moe import MoEConfig
from bigtrain.models.norm import NormConfig, RMSNormConfig
from bigtrain.models.position import RelativeBuckets, bucket
from bigtrain.models.remat import Name, Remat
from bigtrain.parallel import pipeline
from bigtrain.parallel.pipeline import Pipeline
from bigtrain.width import Width


@config
class BlockConfig:
  """What one layer is made of."""

  attention: AttentionConfig | LatentAttentionConfig
  feed_forward: FeedForwardConfig | MoEConfig

  def make(self, stack: "TransformerConfig", init: Initializer, key: jax.Array) -> "Block":
    return Block(self, stack, init, key)


@config
class TransformerConfig:
  """A stack: `first` once, then `pattern` over and over until there are `layers` blocks."""

  dim: int  # Width of the residual stream.
  layers: int  # Blocks in all.
  pattern: tuple[BlockConfig, ...]
  first: tuple[BlockConfig, ...] = ()
  norm: NormConfig = dataclasses.field(default_factory=RMSNormConfig)
  # Where each branch is normalised: its input (`pre`), its sum with the residual (`post`), or its
  # input and its output (`sandwich`).
  norm_placement: Literal["pre", "post", "sandwich"] = "pre"
  relative: RelativeBuckets | None = None  # Biases the scores of every layer.
  dropout: float = 0.0  # Of the embedding and of each branch before it is added.
  # Rate at which the last layer's branches are left out, by example (arXiv:1603.09382); before it
  # the rate grows linearly with the depth, from 0 in the first layer.
  drop_path: float = 0.0
  init: Normal | FanIn | Mup = dataclasses.field(default_factory=Normal)
  remat: Remat = "full"  # What the backward pass need not compute again.
  recompute: tuple[Name, ...] = ()  # Of what it keeps, this is computed again all the same.
  # Of what it keeps, this waits in the host's memory; also `input`, what enters each block.
  offload: tuple[Name, ...] = ()
  unroll: int = 1  # Repeats of the pattern in one iteration of the loop over layers.
  pipeline: Pipeline = dataclasses.field(default_factory=Pipeline)  # On a mesh with stages.

  def segments(self) -> list[tuple[tuple[BlockConfig, ...], int]]:
    """(blocks, repeats) from the first layer to the last."""
    repeats, rest = divmod(self.layers - len(self.first), len(self.pattern))
    parts = [(self.first, 1), (self.pattern, repeats), (self.pattern[:rest], 1)]
    return [(blocks, n) for blocks, n in parts if blocks and n]

  def kept(self) -> tuple[Name, ...] | None:
    """The names of what is kept besides the input of each block; None where all is."""
    return remat.kept(self.remat, self.recompute)

  def dims(self) -> dict[str, tuple[str, int]]:
    """As in ModelConfig: what the mesh must divide."""
    dims = {"dim": ("D", self.dim)}
    for name, blocks in (("first", self.first), ("pattern", self.pattern)):
      for i, block in enumerate(blocks):
        parts = {"attention": block.attention, "feed_forward": block.feed_forward}
        for part, c in parts.items():
          dims |= {f"{name}.{i}.{part}.{field}": of for field, of in c.dims().items()}
    return dims

  def check_stages(self, stages: int, rows: int) -> None:
    """Refuses what cannot be laid over stages, `rows` of each shard of the batch going through.

    The `first` blocks, and what is left over of the pattern, are not on stages.
    """
    if self.offload:
      raise Refused("nothing can be sent to the host from within stages; leave `offload` empty")
    repeats = (self.layers - len(self.first)) // len(self.pattern)
    self.pipeline.check_layers(stages, repeats, rows)

  def width(self) -> Width | None:
    """As in ModelConfig: how much wider this is than the base of Mup."""
    if not isinstance(self.init, Mup):
      return None
    return self.init.width(self.dim, self.pattern[0].attention.sizes(self.dim)["H"])

  def flops(self, length: int = 1) -> float:
    """Training FLOPs of the blocks on one row."""
    of = lambda block: sum(
      part.flops(self.dim, length) for part in (block.attention, block.feed_forward)
    )
    return sum(repeats * sum(map(of, blocks)) for blocks, repeats in self.segments())

  def check(self) -> None:
    if self.dim < 1:
      raise Refused(f"model: dim is {self.dim}; it must be positive")
    if not self.pattern:
      raise Refused("model: `pattern` is empty; give at least one block")
    if self.layers < len(self.first) + 1:
      raise Refused(
        f"model: {self.layers} layers leave none for the pattern after {len(self.first)} first "
        f"blocks; set layers to {len(self.first) + 1} or more"
      )
    for block in (*self.first, *self.pattern):
      block.attention.check_dim(self.dim)
      if isinstance(self.init, Mup):
        self._check_growth(self.init, block)
    if self.relative is not None:
      self.relative.check()
      attentions = [block.attention for block in (*self.first, *self.pattern)]
      heads = ((a.causal, a.sizes(self.dim)) for a in attentions)
      if len({(causal, s["K"], s["G"]) for causal, s in heads}) > 1:
        raise Refused(
          "model: relative biases are one table for all layers; give every block's attention the "
          "same heads, kv_heads and causal"
        )
    if self.unroll < 1:
      raise Refused(f"model: unroll is {self.unroll}; it must be at least 1 (no unrolling)")
    made = [name for b in (*self.first, *self.pattern) for name in b.feed_forward.names()]
    remat.refuse(self.remat, self.recompute, self.offload, {*remat.OF_ALL, *made})
    if not 0 <= self.dropout < 1:
      raise Refused(f"model: dropout is {self.dropout}; it is a rate, from 0 to below 1")
    if not 0 <= self.drop_path < 1:
      raise Refused(f"model: drop_path is {self.drop_path}; it is a rate, from 0 to below 1")

  def _check_growth(self, mup: Mup, block: BlockConfig) -> None:
    """Refuses a block that Mup's base cannot have had."""
    if mup.head_dim is None:
      raise Refused("model: Mup needs the base's head_dim too, by which attention scores change")
    if isinstance(block.feed_forward, MoEConfig) or isinstance(
      block.attention, LatentAttentionConfig
    ):
      raise Refused("model: Mup has no rules for experts and latents; set init to Normal or FanIn")
    sizes = block.attention.sizes(self.dim)
    if (first := self.pattern[0].attention.sizes(self.dim)["H"]) != sizes["H"]:
      raise Refused(f"model: Mup needs heads of one width, not of {first} and {sizes['H']}")
    mup.check_size("feed_forward.hidden", block.feed_forward.hidden, self.dim)
    for name, heads in (("heads", sizes["K"] * sizes["G"]), ("kv_heads", sizes["K"])):
      mup.check_size(f"{name} * head_dim", heads * sizes["H"], self.dim, mup.head_dim)


class Block(nnx.Module):
  """Attention, then a feed-forward network, each added to the residual stream."""

  def __init__(self, c: BlockConfig, stack: TransformerConfig, init: Initializer, key: jax.Array):
    self.dropout, self.placement = stack.dropout, stack.norm_placement
    ka, kf = jax.random.split(key)
    norm = functools.partial(stack.norm.make, stack.dim)
    self.attention = c.attention.make(stack.dim, init, ka)
    self.feed_forward = c.feed_forward.make(stack.dim, init, kf)
    self.attention_norm, self.feed_forward_norm = norm(), norm()
    sandwich = stack.norm_placement == "sandwich"
    self.attention_out_norm = norm() if sandwich else None
    self.feed_forward_out_norm = norm() if sandwich else None

  def __call__(
    self, x_BTD, tokens: Tokens, key=None, cache=None, drop_path=None, bias_KGP=None
  ) -> tuple[jax.Array, Any]:
    """The block's output (B, T, D) and its extended cache; `drop_path` is this layer's rate."""
    ka, kd, *kf = (None,) * 4 if key is None else jax.random.split(key, 4)
    attend = lambda h_BTD: self.attention(h_BTD, tokens, ka, cache, bias_KGP)
    x_BTD, cache = self.branch("attention", attend, x_BTD, kd, drop_path)
    return self.feed(x_BTD, tokens, kf, drop_path), cache

  def feed(self, x_BTD, tokens: Tokens, keys, drop_path) -> jax.Array:
    """The residual stream behind the feed-forward network, which ends the block."""
    kd, kf = keys
    x_BTD = checkpoint_name(x_BTD, "residual")
    feed = lambda h_BTD: (self.feed_forward(h_BTD, kf, tokens), None)
    x_BTD, _ = self.branch("feed_forward", feed, x_BTD, kd, drop_path)
    taps.tap("output", taps.rms, x_BTD)
    return x_BTD

  def branch(self, name: str, function, x_BTD, key, drop_path):
    """The residual stream with what `function` makes of it, and what else that returns.

    The norms are those that begin with `name`.
    """
    norm, out_norm = getattr(self, f"{name}_norm"), getattr(self, f"{name}_out_norm")
    with jax.named_scope(name), taps.named(name):
      y_BTD, more = function(x_BTD if self.placement == "post" else norm(x_BTD))
      if out_norm is not None:
        y_BTD = out_norm(y_BTD)
      y_BTD = dropout(y_BTD, self.dropout, key)
      if key is not None and drop_path is not None:
        key = jax.random.fold_in(key, 1)  # Elements and rows are dropped independently.
        y_BTD = dropout(y_BTD, drop_path, key, dims=1)
      x_BTD = x_BTD + y_BTD
      return norm(x_BTD) if self.placement == "post" else x_BTD, more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """Keys and values of one layer, and where they stand in the text."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array
  tokens: Tokens  # Of all S slots; the position of an empty one is negative.
  length: jax.Array  # Slots that were filled before this call, ().

  def extended(self, k_BTKH, v_BTKH) -> "LayerCache":
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.length, axis=1)
    k_BSKH = write(self.k_BSKH, k_BTKH.astype(self.k_BSKH.dtype))
    v_BSKH = write(self.v_BSKH, v_BTKH.astype(self.v_BSKH.dtype))
    return dataclasses.replace(self, k_BSKH=k_BSKH, v_BSKH=v_BSKH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of a whole stack: for each segment and each block of its pattern, a pair."""

  pairs: list  # [segment][block] = (k, v), each (repeats, B, S, K, H).
  positions_BS: jax.Array
  length: jax.Array
  embed_B1D: Any = None  # The last token's embedding, where the model shifts embeddings.


class Transformer(nnx.Module):
  """Blocks with stacked parameters: `segments[i][j]` is block j of segment i, over its repeats."""

  def __init__(self, c: TransformerConfig, key: jax.Array):
    self.c = c
    init = Initializer(c.init, c.layers, c.width())
    keys = jax.random.split(key, c.layers)
    self.segments = nnx.List()
    for blocks, repeats in c.segments():
      here, keys = keys[: len(blocks) * repeats], keys[len(blocks) * repeats :]
      stacked = [
        jax.vmap(lambda k, block=block: block.make(c, init, k))(here[j :: len(blocks)])
        for j, block in enumerate(blocks)
      ]
      self.segments.append(nnx.List(sharding.stacked(stacked)))
    sizes = c.pattern[0].attention.sizes(c.dim) | {"R": c.relative.buckets if c.relative else 0}
    key = jax.random.fold_in(key, 2**32 - 1)  # A branch beside those of the layers.
    bias_RKG = init.weight(key, "RKG", sizes, fan_in="D") if c.relative else None
    self.relative_bias_RKG = bias_RKG

  def __call__(
    self, x_BTD, tokens: Tokens, key=None, cache: Cache | None = None, memory: Memory | None = None
  ):
    """All layers in turn. Returns the output (B, T, D) and the extended cache, if there is one.

    A `memory` is for blocks that attend to one (models/encoder_decoder.py).
    """
    keys = None if key is None else jax.random.split(key, self.c.layers)
    rates = jnp.linspace(0, self.c.drop_path, self.c.layers) if self.c.drop_path else None
    if cache is not None:
      positions_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.positions_BS, tokens.positions, cache.length, axis=1
      )
      cache = dataclasses.replace(cache, positions_BS=positions_BS)
    bias_KGP = self._bias(x_BTD.shape[1], cache)
    pairs = []
    for i, (_, repeats) in enumerate(self.c.segments()):
      blocks = self.segments[i]
      n = len(blocks) * repeats
      shape, rest = (repeats, len(blocks)), (keys, rates)
      here = jax.tree.map(lambda a, n=n, shape=shape: a[:n].reshape(shape), rest)
      keys, rates = jax.tree.map(lambda a, n=n: a[n:], rest)
      remembered = memory and memory.pairs and memory.pairs[i]
      unroll = min(self.c.unroll, repeats)
      apply = self._remat(unroll == repeats)
      if cache is None and pipeline.is_staged(list(blocks)):
        stage = functools.partial(_stage, apply=apply, unroll=unroll)
        layers, of_rows = (list(blocks), *here), (tokens, memory)
        kept = self.c.kept()
        x_BTD, found = pipeline.run(stage, self.c.pipeline, kept, layers, x_BTD, of_rows, bias_KGP)
      else:
        # What every layer is given.
        given = {"tokens": tokens, "cache": cache, "bias_KGP": bias_KGP, "memory": memory}
        body = functools.partial(_repeat, apply=apply, **given)
        rest = (*here, cache and cache.pairs[i], remembered)
        x_BTD, (pair, found) = pipeline.layer_scan(body, x_BTD, list(blocks), rest, unroll)
        pairs.append(pair)
      with taps.named("segments", i):
        taps.hand_on(found)
    if cache is not None:
      length = cache.length + x_BTD.shape[1]
      cache = dataclasses.replace(cache, pairs=pairs, length=length)
    return x_BTD, cache

  def _bias(self, T: int, cache: Cache | None) -> jax.Array | None:
    """The relative bias of T queries, which follow what the cache holds; None without one.

    Distances are those of columns: the tokens of a document stand side by side, and between others
    nothing is seen. So one vector serves all rows.
    """
    if self.relative_bias_RKG is None or self.c.relative is None:
      return None
    S, start = (T, 0) if cache is None else (cache.positions_BS.shape[1], cache.length)
    after_P = jnp.arange(T + S - 1) - (T - 1) - start
    bucket_P = bucket(self.c.relative, after_P, causal=self.c.pattern[0].attention.causal)
    table_RKG = sharding.use(self.relative_bias_RKG, "RKG")
    bias_PKG = table_RKG.at[bucket_P].get(out_sharding=sharding.act("PKG"))
    return jnp.transpose(bias_PKG, (1, 2, 0))

  def _remat(self, unrolled: bool):
    def apply(block, x_BTD, *args):
      if "input" in self.c.offload:  # Without a name it stays where it is.
        x_BTD = checkpoint_name(x_BTD, remat.INPUT)
      return taps.collected(block)(x_BTD, *args)

    kept = self.c.kept()
    if (policy := remat.policy(kept, self.c.offload)) is None:
      return apply
    # Within a loop the compiler cannot merge the two computations; outside it must be kept from it.
    return jax.checkpoint(apply, policy=policy, prevent_cse=unrolled)

  def cache(self, batch: int, length: int, dtype) -> Cache:
    """An empty cache for `length` positions."""
    pairs = []
    for blocks, repeats in self.c.segments():
      sizes = [block.attention.sizes(self.c.dim) for block in blocks]
      shapes = [(repeats, batch, length, s["K"], s["H"]) for s in sizes]
      zeros = functools.partial(jnp.zeros, dtype=dtype, out_sharding=sharding.act("RBSKH"))
      pairs.append([(zeros(shape), zeros(shape)) for shape in shapes])
    positions_BS = jnp.full((batch, length), -1, jnp.int32, out_sharding=sharding.act("BS"))
    return Cache(pairs=pairs, positions_BS=positions_BS, length=jnp.zeros((), jnp.int32))


def _stage(layers, x_BTD, of_rows, bias_KGP, *, apply, unroll: int):
  """Some repeats of a pattern, as a stage of a pipeline applies them."""
  tokens, memory = of_rows
  given = {"tokens": tokens, "cache": None, "bias_KGP": bias_KGP, "memory": memory}
  body = functools.partial(_repeat, apply=apply, **given)
  length = len(jax.tree.leaves(layers)[0])
  layers = (*layers, None, None)
  x_BTD, (_, found) = jax.lax.scan(body, x_BTD, layers, unroll=min(unroll, length))
  return x_BTD, found


def _repeat(x_BTD, layer, *, apply, tokens: Tokens, cache: Cache | None, bias_KGP, memory):
  """One repeat of a pattern: the body of the scan."""
  blocks, keys, rates, pairs, remembered = layer
  extended, found = [], {}
  for j, block in enumerate(blocks):
    layer_cache = None
    if cache is not None:
      k_BSKH, v_BSKH = pairs[j]
      layer_cache = LayerCache(k_BSKH, v_BSKH, Tokens(cache.positions_BS), cache.length)
    key, rate = jax.tree.map(lambda a, j=j: a[j], (keys, rates))
    x_BTD = checkpoint_name(x_BTD, remat.INPUT)
    given = (x_BTD, tokens, key, layer_cache, rate, bias_KGP)
    if memory is not None:
      given += (dataclasses.replace(memory, pairs=remembered and remembered[j]),)
    with jax.named_scope(f"block{j}"):
      (x_BTD, layer_cache), tapped = apply(block, *given)
    found |= taps.under(j, tapped)
    extended.append(layer_cache and (layer_cache.k_BSKH, layer_cache.v_BSKH))
  return x_BTD, (extended, found)
