"""Which of several classes an input is of, and the two mixtures of inputs that regularise this.

A row is mixed with the one after it, the last with the first: batches come in random order, so that
any row is as good a partner, and a device needs one row of its neighbour and no more.

Dims: B batch, C classes, R image row, S image column.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.experiment import ObjectiveConfig
from bigtrain.hints import to_set
from bigtrain.objectives.output import Output, by_source
from bigtrain.parallel.context import cut

TOP = 5  # Guesses of the second metric.


@config
class Classification(ObjectiveConfig):
  """The categorical cross-entropy of `batch["labels"]`, weighted by `batch["weights"]`.

  The model offers `logits(inputs, key) -> logits_BC`: it takes `batch["inputs"]`, (B, ...) float32,
  or the batch itself where that has other inputs, such as tokens, and returns a score for each
  class, float32; a key means training (dropout), None evaluation.

  Metrics: `loss` (nats, without smoothing, so that runs compare), `loss/<source>` where the data is
  a mixture, `accuracy`, and `top5_accuracy` where there are more than 5 classes. Of two rows that
  are mixed each is the mean over both labels, by their shares. Mixing is of training alone, and
  within a microbatch. A label without a score has no probability: the loss is then NaN.
  """

  takes: ClassVar[str] = (
    "a model with classes (MLPConfig, presets.vit(...), TextClassifierConfig) and data with labels "
    "(FeatureData, ImageData, LabelledText)"
  )

  label_smoothing: float = 0.0  # Share spread over all classes (Szegedy 2015, arXiv:1512.00567).
  # Share of each row ~ Beta(a, a), the rest is its partner's; 0 for none, 0.2 on ImageNet in Zhang
  # 2017, arXiv:1710.09412.
  mixup: float = 0.0
  # The same of the area of an image, the rest being a box of the partner's; 1 in Yun 2019,
  # arXiv:1905.04899. Where both are on, each row has one of them, as often as the other.
  cutmix: float = 0.0

  def check(self) -> None:
    if not 0 <= self.label_smoothing < 1:
      raise Refused(f"label_smoothing is {self.label_smoothing}; it is a share, from 0 to below 1")
    for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
      if alpha < 0:
        raise Refused(f"{name} is {alpha}; it is the parameter of a Beta distribution, or 0: off")

  def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    inputs: Any = batch.get("inputs", batch)
    labels_B, weights_B, share_B = batch["labels"], batch["weights"], None
    if key is not None and (self.mixup or self.cutmix):
      if inputs is batch:
        raise Refused("mixup and cutmix mix numbers, not tokens; set both to 0")
      if len(inputs) < 2:
        raise Refused(
          "mixup and cutmix mix a row with the next of its microbatch, which has only one; take "
          "fewer microbatches, or set both to 0"
        )
      key, mixing = jax.random.split(key)
      inputs, share_B = self._mix(inputs, weights_B, sharding.of_microbatch(mixing))
    with cut(batch) as parts:
      logits_BC = model.logits(parts if inputs is batch else inputs, key)
    with jax.named_scope("loss"):
      log_p_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32))
      found = _guesses(log_p_BC, labels_B)
      if share_B is not None:
        other = _guesses(log_p_BC, _partner(labels_B))
        found = {k: share_B * x_B + (1 - share_B) * other[k] for k, x_B in found.items()}
      sums = {k: (weights_B * x_B).sum() for k, x_B in found.items()}
      spread = (weights_B * -log_p_BC.mean(-1)).sum()
    s, weight = self.label_smoothing, weights_B.sum()
    loss_sum = (1 - s) * sums["loss"] + s * spread
    metrics = {name: (value, weight) for name, value in sums.items()}
    return Output(
      loss_sum, weight, metrics | by_source(batch, weights_B * found["loss"], weights_B)
    )

  def _mix(self, inputs: jax.Array, weights_B: jax.Array, key) -> tuple[jax.Array, jax.Array]:
    """Mixed inputs, and the share that each row keeps of itself."""
    km, kc, kb, ks = jax.random.split(key, 4)
    own = jnp.ones(())  # By element, as far as they differ: the share that is the row's own.
    if self.mixup:
      own = _wide(_draw(jax.random.beta, km, len(inputs), self.mixup, self.mixup), inputs)
    if self.cutmix:
      area_B = _draw(jax.random.beta, kc, len(inputs), self.cutmix, self.cutmix)
      box = _outside_box(inputs, area_B, kb)
      cut = _wide(_draw(jax.random.uniform, ks, len(inputs)) < 0.5, inputs)
      own = jnp.where(cut, box, own) if self.mixup else box
    own = jnp.where(_wide(_partner(weights_B) > 0, inputs), own, 1.0)  # Padding is no partner.
    share_B = own.mean(range(1, own.ndim))
    return own * inputs + (1 - own) * _partner(inputs), share_B


def _guesses(log_p_BC: jax.Array, labels_B: jax.Array) -> dict[str, jax.Array]:
  """By row: -log p of the label, and whether it is the likeliest class, or one of the first few."""
  classes_C = jnp.arange(log_p_BC.shape[-1])
  hit_BC = labels_B[:, None] == classes_C
  label_B1 = jnp.where(hit_BC, log_p_BC, 0).sum(-1, keepdims=True)
  label_B1 = jnp.where(hit_BC.any(-1, keepdims=True), label_B1, jnp.nan)  # A wrong label shows.
  # Of equals the first is the likeliest, as in argmax.
  before_BC = (log_p_BC > label_B1) | ((log_p_BC == label_B1) & (classes_C < labels_B[:, None]))
  rank_B = before_BC.sum(-1)
  found = {"loss": -label_B1[:, 0], "accuracy": rank_B == 0}
  return found | ({"top5_accuracy": rank_B < TOP} if len(classes_C) > TOP else {})


def _outside_box(images_BRSC: jax.Array, area_B: jax.Array, key) -> jax.Array:
  """1 outside of a box around a random pixel and 0 in it, (B, R, S, 1).

  Outside is `area` of the image, or more where the box does not lie within it.
  """
  if images_BRSC.ndim != 4:
    raise Refused(
      f"cutmix is for images, (B, height, width, channels), not inputs of shape "
      f"{images_BRSC.shape}; set {to_set('objective.cutmix', 0)}"
    )
  B, R, S, _ = images_BRSC.shape

  def near(size: int, key) -> jax.Array:
    centre_B = size * _draw(jax.random.uniform, key, B)
    distance = jnp.abs(jnp.arange(size) + 0.5 - centre_B[:, None])
    return distance < (size / 2 * jnp.sqrt(1 - area_B))[:, None]

  kr, ks = jax.random.split(key)
  return 1.0 - (near(R, kr)[:, :, None, None] & near(S, ks)[:, None, :, None])


def _draw(distribution, key, rows: int, *parameters) -> jax.Array:
  """One random number for each row, (B,); the same bits on any mesh."""
  return sharding.lay(distribution(key, *parameters, shape=(rows,)), "B")


def _partner(x_B: jax.Array) -> jax.Array:
  """For each row the one that follows it; for the last the first."""
  roll: Any = jax.sharding.auto_axes(lambda x: jnp.roll(x, -1, axis=0))
  return roll(x_B, out_sharding=jax.typeof(x_B).sharding.spec)


def _wide(x_B: jax.Array, like: jax.Array) -> jax.Array:
  """Numbers by row, to be multiplied with `like`."""
  return jnp.expand_dims(x_B, range(1, like.ndim))
