"""Marks on the parameters whose products are low, and what delayed scaling remembers of these.

A program marks the parameters just before it calls the model (`low`): what is marked is multiplied
in eight bits by `precision.project`, and is stored, trained and saved as any other parameter. Never
marked, whatever the settings, is what is looked up, what makes logits and what routes: tables,
heads, routers; nor are experts, whose products are grouped ones.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigtrain.config import Refused, nearest
from bigtrain.leaves import path_name
from bigtrain.products import Delayed, Products

# Letters of vocabulary, positions, token types, queries of a pool, relative buckets, routers,
# experts and classes: a parameter with one of them is never marked.
NEVER = set("VTYQRXEC")
Amax = Mapping[str, jax.Array]  # (..., 3): largest magnitudes of x, w and the gradient, by path.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Low:
  """A stored parameter whose products are low: the value of a marked `nnx.Param`."""

  array: Any
  amax_3: Any  # Delayed scaling's largest magnitudes of x, w and the gradient; else None.
  c: Products = dataclasses.field(metadata={"static": True})

  def __getitem__(self, index) -> jax.Array:
    return self.array[index]

  shape = property(lambda self: self.array.shape)
  ndim = property(lambda self: self.array.ndim)
  dtype = property(lambda self: self.array.dtype)


def low_of(w) -> Low | None:
  """What marks a stored parameter; None if nothing does."""
  value = w.get_value() if isinstance(w, nnx.Variable) else w
  return value if isinstance(value, Low) else None


def low(c: Products | None, module: Any, amax: Amax) -> Any:
  """The module with its parameters marked; `amax` is {} without delayed scaling.

  Raises:
    Refused: no product of the module can be low, or a pattern of `high` is found in no path.
  """
  if c is None:
    return module
  marked = _paths(c, module)

  def mark(path, leaf):
    if (name := path_name(path)) not in marked:
      return leaf
    return leaf.replace(Low(leaf.get_value(), amax.get(name), c))

  return jax.tree_util.tree_map_with_path(mark, module, is_leaf=_is_parameter)


def histories(c: Products | None, module: Any) -> dict[str, jax.Array]:
  """What delayed scaling remembers before the first update, (..., 3, history) by path; else {}.

  Layers of a stack have their own, in front.

  Raises:
    Refused: as `low`.
  """
  if c is None:
    return {}
  marked = _paths(c, module)
  if not isinstance(c.scaling, Delayed):
    return {}
  kept = c.scaling.history
  zeros = lambda stack: jnp.zeros((*stack, 3, kept), jnp.float32)
  return {path: zeros(stack) for path, stack in marked.items()}


def largest(histories: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The largest magnitudes by which the next products are scaled."""
  return {path: seen.max(axis=-1) for path, seen in histories.items()}


def followed(histories: Mapping[str, jax.Array], seen: Amax) -> dict[str, jax.Array]:
  """The histories with what an update has seen in the place of what is oldest.

  What is not finite is not remembered: it shows in the update that met it, and would make every
  scale of the next ones no number either.
  """

  def join(old, new_1):
    return jnp.where(jnp.isfinite(new_1), jnp.concatenate([new_1, old[..., :-1]], axis=-1), old)

  return {path: join(old, seen[path][..., None]) for path, old in histories.items()}


def _paths(c: Products, module: Any) -> dict[str, tuple[int, ...]]:
  """Paths of the parameters to be marked, with the dims of their stacks."""
  leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=_is_parameter)
  products = {path: w for path, w in leaves if _is_parameter(w) and _can_be_low(w)}
  if not products:
    raise Refused(
      f"products: no weight of a {type(module).__name__} goes through precision.project, which "
      "makes products low; set products to None"
    )
  names = {path: jax.tree_util.keystr(path) for path in products}
  for pattern in c.high:
    if not any(re.search(pattern, name) for name in names.values()):
      raise Refused(
        f"products: high: {pattern!r} is found in no product's path"
        f"{nearest(pattern, names.values())}"
      )
  spared = lambda path: any(re.search(pattern, names[path]) for pattern in c.high)
  of_stack = lambda w: w.shape[: w.ndim - len(w.dims)]
  return {path_name(path): of_stack(w) for path, w in products.items() if not spared(path)}


def _is_parameter(node) -> bool:
  return isinstance(node, nnx.Param)


def _can_be_low(w: nnx.Param) -> bool:
  dims = getattr(w, "dims", None)
  return dims is not None and len(dims) > 1 and not NEVER & set(dims)
