"""The guard: whether a step's update is applied, decided in the step from its own numbers.

When the host sees a NaN, the state from before it has long been donated. So the state carries what
is needed to judge a step, and a bad one leaves everything but its counters as it was.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigtrain.experiment import ModelConfig
from bigtrain.faults import Faults

Memory = dict[str, jax.Array]  # In State.statistics; zeros at first.
FLOOR = 0.01  # The least deviation, as a share of loss or norm: they can stand still for a while.


def begin(c: Faults) -> Memory:
  """What is remembered before the first step."""
  memory = {"faults_in_a_row": jnp.zeros((), jnp.int32)}
  if c.spike is not None:
    memory["accepted"] = jnp.zeros((), jnp.int32)
    memory["recent"] = jnp.zeros((2, c.window), jnp.float32)  # Losses, and log gradient norms.
  if c.policy == "lower_rate":
    memory |= {"lowered": jnp.zeros((), jnp.int32), "good": jnp.zeros((), jnp.int32)}
  return memory


def judge(c: Faults, memory: Memory, loss, norm) -> tuple[jax.Array, jax.Array, Memory]:
  """Whether a step with that loss and gradient norm is a good one.

  Returns:
    bool; the robust z-score of the worse of the two, NaN where there is none; and what is
    remembered behind the step.
  """
  good, score = jnp.isfinite(loss) & jnp.isfinite(norm), jnp.float32(jnp.nan)
  after = dict(memory)
  if c.spike is not None:
    now, recent = jnp.stack([loss, jnp.log(norm)]).astype(jnp.float32), memory["recent"]
    full = memory["accepted"] >= c.window
    score = jnp.where(full, jnp.max(z_scores(recent, now)), jnp.nan)
    spike = score > c.spike
    usual = memory["faults_in_a_row"] >= c.patience  # It is no spike but the new normal.
    good &= ~spike | usual
    # A step without a gradient (all of its tokens padding) tells nothing.
    keeps = good & jnp.isfinite(now).all()
    rolled = jnp.concatenate([recent[:, 1:], now[:, None]], axis=1)
    after["recent"] = jnp.where(keeps, rolled, recent)
    before = jnp.where(spike & usual & good, 0, memory["accepted"])
    after["accepted"] = jnp.minimum(before + keeps, c.window)
  after["faults_in_a_row"] = jnp.where(good, 0, memory["faults_in_a_row"] + 1)
  if c.policy == "lower_rate":
    in_a_row = jnp.where(good, memory["good"] + 1, 0)
    recovers = in_a_row >= c.recovery
    lowered = memory["lowered"] + jnp.where(good, 0, 1) - recovers
    after |= {"lowered": jnp.maximum(lowered, 0), "good": jnp.where(recovers, 0, in_a_row)}
  return good, score, after


def limits(model: ModelConfig) -> dict[str, int]:
  """Below what the ids of a batch have to be, by the array's name."""
  known = {
    "tokens": model.vocabulary(),
    "targets": model.vocabulary(),
    "token_types": model.n_token_types(),
    "labels": model.n_classes(),
  }
  return {name: limit for name, limit in known.items() if limit is not None}


def out_of_range(model: ModelConfig, batch: Mapping[str, jax.Array]) -> jax.Array:
  """bool: whether an id of a batch stands for nothing. Looked up, it is taken for another one."""
  found = [
    ((batch[name] < 0) | (batch[name] >= limit)).any()
    for name, limit in limits(model).items()
    if name in batch
  ]
  return jnp.stack(found).any() if found else jnp.bool_(False)


def loss(model: ModelConfig, batch: Mapping[str, jax.Array], mean_loss) -> jax.Array:
  """The loss of a batch, NaN where one of its ids stands for nothing: then there is none."""
  return jnp.where(out_of_range(model, batch), jnp.nan, mean_loss)


def z_scores(recent: jax.Array, now: jax.Array) -> jax.Array:
  """Deviations of `now` above the medians of `recent`, (2, window), in robust units.

  Both are of losses and of logarithms of gradient norms.
  """
  median = jnp.median(recent, axis=1)
  spread = 1.4826 * jnp.median(jnp.abs(recent - median[:, None]), axis=1)
  one = jnp.stack([jnp.maximum(jnp.abs(median[0]), 1e-6), 1.0])  # A share is a difference of logs.
  return (now - median) / jnp.maximum(spread, FLOOR * one)


def rate(c: Faults, memory: Memory) -> jax.Array | None:
  """What the learning rate is multiplied by; None where the policy is another."""
  if c.policy != "lower_rate":
    return None
  return c.factor ** memory["lowered"].astype(jnp.float32)


def chosen(good: jax.Array, new: Any, old: Any) -> Any:
  """`new` behind a good step, else `old`.

  Raises:
    TypeError: they are not alike.
  """
  if (made := jax.tree.structure(new)) != (before := jax.tree.structure(old)):
    raise TypeError(f"an update made of\n{before}\nanother tree:\n{made}")
  return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def guarded(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """The same with an argument `good`; where it is False, updates are 0 and the state stays."""
  transformation = optax.with_extra_args_support(transformation)

  def update(updates, state, params=None, *, good: Any = True, **extra):
    updates, after = transformation.update(updates, state, params, **extra)
    nothing = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)  # -0.0 + 0.0 is another zero.
    return chosen(good, updates, nothing), chosen(good, after, state)

  return optax.GradientTransformationExtraArgs(transformation.init, update)
