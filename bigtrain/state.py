"""State: everything that decides the future of a run, besides its experiment.

The `nnx.Param` leaves of a module are its parameters. Every other `nnx.Variable` in it (BatchNorm's
running means, a router's balance) has no gradient: it lives beside the parameters, and an objective
returns what it is after a batch in `Output.variables`.
"""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A pytree of arrays; one checkpoint item holds it."""

  step: jax.Array  # Completed updates, int32.
  example: jax.Array  # The next global example, uint32: the data position.
  model: Any  # The module with its parameters alone, float32 unless Experiment.weights says else.
  optimizer: optax.OptState
  variables: Any  # The module with all its other variables alone.
  # Running statistics of the training itself: "consumed", the digest of all batches so far;
  # "highest", the highest loss since the last row; "amax" of delayed scaling (marks.py). What an
  # older version did not save begins as zeros.
  statistics: dict[str, Any]

  @property
  def module(self) -> Any:
    """The whole module, which can be called."""
    return combine(self.model, self.variables)


def partition(module) -> tuple[Any, Any]:
  """A module as two of its structure: its parameters alone, and its other variables alone."""
  is_parameter = lambda leaf: isinstance(leaf, nnx.Param)
  parameters = jax.tree.map(lambda x: x if is_parameter(x) else None, module, is_leaf=_is_variable)
  variables = jax.tree.map(lambda x: None if is_parameter(x) else x, module, is_leaf=_is_variable)
  return parameters, variables


def combine(parameters, variables) -> Any:
  """The module whose `partition` these are."""
  is_leaf = lambda node: node is None or _is_variable(node)
  return jax.tree.map(lambda p, v: v if p is None else p, parameters, variables, is_leaf=is_leaf)


def _is_variable(node) -> bool:
  return isinstance(node, nnx.Variable)
