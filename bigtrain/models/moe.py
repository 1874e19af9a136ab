"""A mixture of experts in place of the position-wise network: a token goes through a few of many.

The router chooses in float32. What it and the experts report (losses that keep experts evenly
loaded, how many tokens each has had, how many found no room) are sums of taps.py, which the
training step adds to its loss and metrics (objectives/experts.py).

Dims: B batch, T position, D model, F hidden, E expert, X router output (one for each expert, not
sharded), A choices of a token, Y group of experts, R row, C slot.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.kernels.attention import Tokens
from bigtrain.kernels.grouped import grouped
from bigtrain.models.activation import FUNCTIONS, ActivationName
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer
from bigtrain.models.remat import Name
from bigtrain.parallel.expert import Capacity, Dropless, through_experts
from bigtrain.precision import project, raised


@config
class Groups:
  """Experts are chosen from the best groups alone (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

  Where each group lies on devices of its own, a token travels to few of them.
  """

  groups: int = 8  # Of equally many neighbouring experts.
  kept: int = 4  # Groups, by the sum of the two highest scores in each.


@config
class BalanceLoss:
  """Adds to the loss what grows as tokens crowd (Switch, arXiv:2101.03961, equation 4).

  It is experts * sum over them of (share of choices) * (mean probability): 1 where all are even.
  """

  factor: float = 0.01
  # Whose tokens it is of: each `row` of the batch by itself (DeepSeek-V3, equation 17), or the
  # whole `batch`, on all devices, which leaves experts free to specialise (arXiv:2501.11873). Of
  # several microbatches, those of a pipeline too, it is of each by itself, and the loss has their
  # mean by tokens: only by row is that what the whole batch has.
  over: Literal["row", "batch"] = "batch"


@config
class RouterConfig:
  """How a token's experts are chosen and weighted."""

  scores: Literal["softmax", "sigmoid"] = "softmax"
  normalized: bool = True  # The weights of a token's experts are divided by their sum.
  scale: float = 1.0  # Factor of the weights, after that.
  groups: Groups | None = None  # None chooses from all.
  balance_loss: BalanceLoss | None = dataclasses.field(default_factory=BalanceLoss)
  z_loss: float = 0.0  # Factor of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906: 1e-3).
  # Balances without a loss: after every update each expert's bias, which is added to its score for
  # choosing alone, moves by this against its load (arXiv:2408.15664: 1e-3). None: no biases.
  bias_rate: float | None = None

  def check(self) -> None:
    for name in ("scale", "bias_rate"):
      if (value := getattr(self, name)) is not None and value <= 0:
        raise Refused(f"router: {name} is {value}; it must be positive")
    if self.z_loss < 0 or (self.balance_loss is not None and self.balance_loss.factor <= 0):
      raise Refused("router: factors of losses are positive (z_loss 0 and balance_loss None: none)")


@config
class MoEConfig:
  """Experts that are gated networks, of which each token chooses `top_k`."""

  experts: int
  top_k: int  # Experts of a token.
  hidden: int  # Units of each expert.
  shared: int = 0  # Hidden units of an expert that every token has besides; 0 for none.
  activation: ActivationName = "silu"
  router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
  dispatch: Dropless | Capacity = dataclasses.field(default_factory=Dropless)

  def check(self) -> None:
    for name in ("experts", "top_k", "hidden"):
      if getattr(self, name) < 1:
        raise Refused(f"feed_forward: {name} is {getattr(self, name)}; it must be positive")
    if self.shared < 0:
      raise Refused(f"feed_forward: shared is {self.shared}; it is a width, or 0 for none")
    if self.activation == "prelu":
      raise Refused("feed_forward: experts have no slopes to learn; choose another than prelu")
    self.router.check()
    among = self.experts
    if (g := self.router.groups) is not None:
      if g.groups < 1 or self.experts % g.groups or not 1 <= g.kept <= g.groups:
        raise Refused(
          f"router: {g.kept} of {g.groups} groups of {self.experts} experts: groups must divide "
          f"experts, and kept is from 1 to groups"
        )
      among = self.experts // g.groups * g.kept
    if self.top_k > among:
      raise Refused(f"feed_forward: top_k is {self.top_k}, of {among} experts; set it to less")

  def dims(self) -> dict[str, tuple[str, int]]:
    """As in ModelConfig: what the mesh must divide."""
    shared = {"shared": ("F", self.shared)} if self.shared else {}
    return {"experts": ("E", self.experts), "hidden": ("F", self.hidden)} | shared

  def names(self) -> tuple[Name, ...]:
    """As in FeedForwardConfig: what of it remat can keep."""
    return "received", "up", "gate"

  def flops(self, dim: int, length: int) -> float:
    """Training FLOPs of one row: 6 a token and weight that it meets."""
    return 6 * length * dim * (3 * (self.top_k * self.hidden + self.shared) + self.experts)

  def make(self, dim: int, init: Initializer, key: jax.Array) -> "MoE":
    return MoE(self, dim, init, key)


class MoE(nnx.Module):
  def __init__(self, c: MoEConfig, dim: int, init: Initializer, key: jax.Array):
    self.c = c
    kr, ku, kg, kd, ks = jax.random.split(key, 5)
    sizes = {"D": dim, "F": c.hidden, "E": c.experts, "X": c.experts}
    self.router_DX = init.weight(kr, "DX", sizes, fan_in="D")
    self.up_EDF = init.weight(ku, "EDF", sizes, fan_in="D")
    self.gate_EDF = init.weight(kg, "EDF", sizes, fan_in="D")
    self.down_EFD = init.residual(kd, "EFD", sizes, fan_in="F")
    biased = c.router.bias_rate is not None
    self.balance_bias_X = nnx.Variable(jnp.zeros(c.experts)) if biased else None
    shared = FeedForwardConfig(hidden=c.shared, activation=c.activation, gated=True)
    self.shared = shared.make(dim, init, ks) if c.shared else None

  def __call__(self, x_BTD, key=None, tokens: Tokens | None = None) -> jax.Array:
    """What each token's experts make of it, (B, T, D); padding goes to none of them."""
    del key  # There is no dropout here.
    with jax.named_scope("router"):
      weights_BTA, choice_BTA = self._routed(x_BTD, _real(x_BTD, tokens))
    kept = (*sharding.axes("E"), *sharding.axes("F"))  # Along these, every device has its own part.
    over = [axis for axis in sharding.split_over(x_BTD, 2) if axis not in kept]
    stored = (self.up_EDF, "EDF"), (self.gate_EDF, "EDF"), (self.down_EFD, "EFD")
    y_BTD, overflow = through_experts(
      self.c.dispatch,
      functools.partial(_experts, FUNCTIONS[self.c.activation]),
      sharding.shared(x_BTD),
      sharding.shared(weights_BTA),
      sharding.gathered(choice_BTA, sharding.axes("F"), ()),
      self.c.experts,
      [sharding.use(w, dims, x_BTD.dtype, over) for w, dims in stored],
    )
    taps.tap(f"{taps.SUM}overflow", lambda: overflow)
    return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

  def rebalanced(self, load_X: jax.Array) -> jax.Array:
    """The biases after an update whose batch gave each expert so many tokens.

    Of a stack of layers both have one more dim in front.
    """
    assert self.balance_bias_X is not None and self.c.router.bias_rate is not None
    short_X = jnp.sign(load_X.mean(-1, keepdims=True) - load_X)
    return self.balance_bias_X[...] + self.c.router.bias_rate * short_X

  def _routed(self, x_BTD, real_BT) -> tuple[jax.Array, jax.Array]:
    """Weights and numbers of each token's experts, (B, T, A); padding chooses the number X."""
    c = self.c.router
    with jax.default_matmul_precision("float32"):  # Not the bfloat16 that a TPU multiplies by.
      logits_BTX = project("BTD,DX->BTX", x_BTD.astype(raised(x_BTD.dtype)), self.router_DX)
    if c.scores == "softmax":
      score_BTX = prob_BTX = jax.nn.softmax(logits_BTX)
    else:
      score_BTX = jax.nn.sigmoid(logits_BTX)
      prob_BTX = score_BTX / score_BTX.sum(-1, keepdims=True)
    for_choice_BTX = jax.lax.stop_gradient(score_BTX)
    if self.balance_bias_X is not None:
      for_choice_BTX += self.balance_bias_X[...]
    if c.groups is not None:
      for_choice_BTX = _in_best_groups(c.groups, for_choice_BTX)
    choice_BTA = _top_k(for_choice_BTX, self.c.top_k)[1]
    hit_BTAX = choice_BTA[..., None] == jnp.arange(self.c.experts)
    weights_BTA = jnp.where(hit_BTAX, score_BTX[:, :, None], 0).sum(-1)
    if c.normalized:
      weights_BTA /= weights_BTA.sum(-1, keepdims=True) + 1e-20
    self._report(hit_BTAX & real_BT[..., None, None], prob_BTX, logits_BTX, real_BT)
    return c.scale * weights_BTA, jnp.where(real_BT[..., None], choice_BTA, self.c.experts)

  def _report(self, hit_BTAX, prob_BTX, logits_BTX, real_BT) -> None:
    """Loads, and what is added to the loss: a value for each row, to be weighted as rows are."""
    c = self.c.router
    load_BX = hit_BTAX.sum((1, 2)).astype(jnp.float32)
    taps.tap(f"{taps.SUM}load", lambda: load_BX.sum(0))
    tokens_B = jnp.maximum(real_BT.sum(1), 1)
    if (loss := c.balance_loss) is not None:
      taps.tap(f"{taps.OF_ROWS}balance_loss", _balance, loss, load_BX, prob_BTX, real_BT)
    if c.z_loss:
      z_BT = jax.nn.logsumexp(logits_BTX, axis=-1) ** 2
      mean_B = lambda: c.z_loss * (z_BT * real_BT).sum(1) / tokens_B
      taps.tap(f"{taps.OF_ROWS}router_z_loss", mean_B)


def _real(x_BTD, tokens: Tokens | None) -> jax.Array:
  """Which tokens are no padding, (B, T)."""
  real_BT = jnp.ones(x_BTD.shape[:2], bool, out_sharding=sharding.act("BT"))
  if tokens is not None:
    real_BT &= tokens.positions >= 0
    if tokens.segments is not None:
      real_BT &= tokens.segments > 0
  return sharding.lay(real_BT[..., None], "BTX")[..., 0]  # As the residual stream: `sequence` too.


def _balance(c: BalanceLoss, load_BX, prob_BTX, real_BT) -> jax.Array:
  """The balance loss of each row, (B,), with its factor."""
  prob_BX = (prob_BTX * real_BT[..., None]).sum(1)
  if c.over == "batch":
    load_BX, prob_BX = load_BX.sum(0, keepdims=True), prob_BX.sum(0, keepdims=True)
  share_BX = load_BX / jnp.maximum(load_BX.sum(-1, keepdims=True), 1)
  mean_BX = prob_BX / jnp.maximum(prob_BX.sum(-1, keepdims=True), 1)
  loss_B = c.factor * load_BX.shape[-1] * (share_BX * mean_BX).sum(-1)
  return loss_B + jnp.zeros_like(real_BT.sum(1), jnp.float32)  # A column of cut rows is not sliced.


def _in_best_groups(c: Groups, score_BTX) -> jax.Array:
  """Scores, minus infinity outside of the groups that are kept."""
  B, T, X = score_BTX.shape
  shaped = lambda x, shape, dims: jnp.reshape(x, shape, out_sharding=sharding.act(dims))
  score_BTYX = shaped(score_BTX, (B, T, c.groups, X // c.groups), "BTYX")
  best = min(2, X // c.groups)
  group_BTY = _top_k(score_BTYX, best)[0].sum(-1)
  kept_BTA = _top_k(group_BTY, c.kept)[1]
  kept_BTY = (kept_BTA[..., None] == jnp.arange(c.groups)).any(2)
  return shaped(jnp.where(kept_BTY[..., None], score_BTYX, -jnp.inf), (B, T, X), "BTX")


def _top_k(x, n: int) -> tuple[jax.Array, jax.Array]:
  """The n largest of the last dim, and where they are. XLA would gather the whole batch first."""

  def best(x):
    values, places = jax.lax.top_k(x, n)
    return values, places

  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return best(x)
  spec = jax.typeof(x).sharding.spec
  like = (*x.shape[:-1], n)
  results = jax.ShapeDtypeStruct(like, x.dtype), jax.ShapeDtypeStruct(like, jnp.int32)
  return sharding.island(best, (spec, spec), results)(x)


def _experts(activation, x, factor, w, sizes_E) -> jax.Array:
  """Every expert's gated network on its rows, times their factors.

  Rows are (R, D) of these sizes, or (E, C, D) of one size.
  """
  up_EDF, gate_EDF, down_EFD = w
  if sizes_E is None:
    product = functools.partial(jnp.einsum, "ecd,edf->ecf")
  else:
    product = lambda x, w: grouped(x, w, sizes_E)
  up, gate = (
    checkpoint_name(product(x, up_EDF), "up"),
    checkpoint_name(product(x, gate_EDF), "gate"),
  )
  h = (activation(gate) * up * factor).astype(x.dtype)
  if sizes_E is not None:  # Behind the last group is anything, even what is no number.
    h = jnp.where((jnp.arange(len(h)) < sizes_E.sum())[:, None], h, 0)
  return product(h, down_EFD)
