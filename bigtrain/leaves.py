"""The leaves of a tree by name, as checkpoints have them."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from bigtrain.config import Refused, nearest


def flatten(tree) -> dict[str, Any]:
  """Leaves by path: {"model.transformer.segments.0.0.attention.q_DKGH": array, ...}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  flat = {path_name(path): leaf for path, leaf in leaves}
  assert len(flat) == len(leaves), "two leaves have one path"
  return flat


def path_name(path) -> str:
  """A key path as dotted words; the `.value` of an NNX variable is left out."""
  words = re.findall(r"\w+", jax.tree_util.keystr(path))
  return ".".join(words[:-1] if words[-1] == "value" else words)


def unflatten(flat: Mapping[str, Any], like):
  """The tree of `like` with the leaves of `flat`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_name(path)], like)


def check(place: epath.Path, want: Mapping[str, Any], have: Mapping[str, str]) -> None:
  """Refuses a checkpoint that lacks a leaf of `want`, or has another shape or dtype of it."""
  at = f"checkpoint {place}"
  remedy = (
    "it is of another model or optimizer: undo that change, or begin without this checkpoint "
    "(another run directory, no weights_from, or new_weights for what shall begin fresh)"
  )
  for name, leaf in want.items():
    if name not in have:
      raise Refused(f"{at} has no {name}{nearest(name, have)}; {remedy}")
    if have[name] != shown(leaf):
      raise Refused(f"{at} has {name} as {have[name]}, not {shown(leaf)}; {remedy}")


def shown(leaf) -> str:
  """As in float32[64,16]."""
  return f"{jax.numpy.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def placed(x) -> jax.ShapeDtypeStruct:
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here)
