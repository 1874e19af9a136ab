"""What mixtures of experts add to any objective: losses, metrics, and biases after an update.

Dims: B batch, X expert; of a stack of layers, the repeats in front.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain import taps
from bigtrain.models.moe import MoE
from bigtrain.objectives.output import Output

LOSSES = ("balance_loss", "router_z_loss")


def with_experts(objective: Callable[..., Output]) -> Callable[..., Output]:
  """An objective with the losses of all layers of experts, weighted by row as its own is.

  Metrics: `balance_loss` and `router_z_loss`, as they are added, and `overflow`, the share of
  choices that found no room.
  """
  collected = taps.collect(objective, sums=True)

  def call(model, batch: dict[str, jax.Array], key) -> Output:
    output, found = collected(model, batch, key)
    if not found:
      return output
    loss, metrics = output.loss_sum, dict(output.metrics)
    for name in LOSSES:
      if values := _values(found, taps.OF_ROWS, name):
        loss_B = sum(x.reshape(-1, x.shape[-1]).sum(0) for x in values)
        added = output.weight * _mean(loss_B, batch.get("weights"))
        loss, metrics[name] = loss + added, (added, output.weight)
    loads = {name.partition("/")[2]: x for name, x in found.items() if _is(name, taps.SUM, "load")}
    choices = sum(x.sum() for x in loads.values())
    metrics["overflow"] = (sum(x.sum() for x in _values(found, taps.SUM, "overflow")), choices)
    return dataclasses.replace(output, loss_sum=loss, metrics=metrics, loads=loads)

  return call


def load_max(loads: dict[str, jax.Array]) -> jax.Array:
  """How many even shares the fullest expert of any layer has had."""
  ratios = [(x.max(-1) / jnp.maximum(x.mean(-1), 1e-9)).max() for x in loads.values()]
  return jnp.stack(ratios).max()


def rebalanced(module: nnx.Module, variables: Any, loads: dict[str, jax.Array]) -> Any:
  """Variables in which every bias of a router is what it is after an update with these loads.

  Once an update, by the loads of its whole batch: microbatches would each move it.
  """
  after = {}
  for path, layer in nnx.iter_modules(module):
    name = ".".join(map(str, path))
    if isinstance(layer, MoE) and layer.balance_bias_X is not None and name in loads:
      after[".".join(map(str, (*path, "balance_bias_X")))] = layer.rebalanced(loads[name])
  of = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
  return jax.tree_util.tree_map_with_path(lambda path, x: after.get(of(path), x), variables)


def _mean(loss_B, weights) -> jax.Array:
  """Over rows, by the sum of the weights of each."""
  weight_B = jnp.ones_like(loss_B) if weights is None else weights.reshape(len(loss_B), -1).sum(1)
  return (loss_B * weight_B).sum() / jnp.maximum(weight_B.sum(), 1e-9)


def _is(name: str, prefix: str, kind: str) -> bool:
  return name.startswith(f"{prefix}{kind}/")


def _values(found: taps.Found, prefix: str, kind: str) -> list[jax.Array]:
  return [x for name, x in found.items() if _is(name, prefix, kind)]
