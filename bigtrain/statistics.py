"""Statistics of every layer: the sizes of gradients, weights and updates, and what layers tap.

A layer is named by its path, such as `transformer.03.attention`; the layers of a stack, which share
arrays, are numbered by depth. Sizes are root mean squares, so that layers compare.
"""

import collections
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import sharding
from bigtrain.leaves import path_name

STACK = "segments"  # Under this name, leaves are `i.j...`: block j of segment i, over its repeats.


def sizes(**trees) -> dict[str, jax.Array]:
  """{"name/layer": root mean square} of trees of one module's structure; (repeats,) of stacks."""
  found = {}
  for name, tree in trees.items():
    layers: dict[str, list[jax.Array]] = collections.defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      words = path_name(path).split(".")
      layers[".".join(words[:-1] or words)].append(leaf)
    found |= {f"{name}/{at}": _rms(x, STACK in at.split(".")) for at, x in layers.items()}
  return found


def _rms(leaves: list[jax.Array], stacked: bool) -> jax.Array:
  """Of all elements together, or of those of each repeat."""
  over = lambda x: tuple(range(stacked, x.ndim))
  leaves = [x.astype(jnp.float32) for x in leaves]
  # In units of the largest: the squares of a gradient that vanishes are below float32.
  unit = functools.reduce(jnp.maximum, [jnp.abs(x).max(over(x)) for x in leaves])
  unit = jnp.where(unit > 0, unit, 1.0)
  squares = [jnp.square(x / jnp.expand_dims(unit, over(x))).sum(over(x)) for x in leaves]
  count = sum(x.size // (x.shape[0] if stacked else 1) for x in leaves)
  # The layers of a stack may lie on several stages: every process reads all of them.
  return sharding.lay(unit * jnp.sqrt(functools.reduce(jnp.add, squares) / count), "R" * stacked)


def by_layer(found: Mapping[str, np.ndarray]) -> dict[str, float]:
  """{"name/layer": value} with every layer of a stack by its number, two digits or more."""
  return {name: float(value) for name, value in unstacked(found).items()}


def unstacked(found: Mapping[str, Any]) -> dict[str, Any]:
  """{"name/layer...": array} of single layers, those of a stack one after the other by depth.

  Elsewhere the order stays as it is. Of a stack, what lies at `i.j` has its repeats in front.
  """
  shapes: dict[tuple[str, int], dict[int, int]] = collections.defaultdict(dict)
  for name, value in found.items():
    if match := _stacked(name):
      stack, segment, block, _ = match
      shapes[stack, segment][block] = len(value)
  placed, begun = [], {}  # A stack stands where its first array stands.
  for i, (name, value) in enumerate(found.items()):
    match = _stacked(name)
    if match is None:
      placed.append(((i, 0, i), name, value))
      continue
    stack, segment, block, rest = match
    at = begun.setdefault(stack, i)
    before = [
      n for (s, k), blocks in shapes.items() if s == stack and k < segment for n in blocks.values()
    ]
    for repeat, layer in enumerate(value):
      depth = sum(before) + repeat * len(shapes[stack, segment]) + block
      path = f"{name.partition('/')[0]}/{stack}{depth:02}{rest}"
      placed.append(((at, depth, i), path, layer))
  return {name: value for _, name, value in sorted(placed, key=lambda p: p[0])}


def _stacked(name: str) -> tuple[str, int, int, str] | None:
  """What comes before the stack, segment, block, and what comes after."""
  path = name.partition("/")[2]
  match = re.fullmatch(rf"(.*?){STACK}\.(\d+)\.(\d+)(.*)", path)
  return match and (match[1], int(match[2]), int(match[3]), match[4])
