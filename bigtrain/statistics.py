"""Statistics of every layer: the sizes of gradients, weights and updates, and what layers tap.

A layer is named by its path, such as `transformer.03.attention`; the layers of a stack, which share
arrays, are numbered by depth. Sizes are root mean squares, so that layers compare.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain.checkpoint import path_name

STACK = "segments"  # Under this name, leaves are `i.j...`: block j of segment i, over its repeats.


def sizes(**trees) -> dict[str, jax.Array]:
  """{"name/layer": root mean square} of trees of one module's structure; (repeats,) of stacks."""
  found = {}
  for name, tree in trees.items():
    squares: dict[str, Any] = collections.defaultdict(float)
    counts = collections.defaultdict(int)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      words = path_name(path).split(".")
      layer = ".".join(words[:-1] or words)
      stacked = STACK in words
      square = jnp.square(leaf.astype(jnp.float32))
      squares[layer] += square.sum(tuple(range(stacked, leaf.ndim)))
      counts[layer] += leaf.size // (leaf.shape[0] if stacked else 1)
    found |= {f"{name}/{k}": jnp.sqrt(square / counts[k]) for k, square in squares.items()}
  return found


def by_layer(found: Mapping[str, np.ndarray]) -> dict[str, float]:
  """{"name/layer": value} with every layer of a stack by its number, two digits or more."""
  shapes: dict[tuple[str, int], dict[int, int]] = collections.defaultdict(dict)
  for name, value in found.items():
    if match := _stacked(name):
      stack, segment, block, _ = match
      shapes[stack, segment][block] = len(value)
  layers = {}
  for name, value in found.items():
    match = _stacked(name)
    if match is None:
      layers[name] = float(value)
      continue
    stack, segment, block, rest = match
    before = [
      n for (s, i), blocks in shapes.items() if s == stack and i < segment for n in blocks.values()
    ]
    for repeat, number in enumerate(value):
      depth = sum(before) + repeat * len(shapes[stack, segment]) + block
      layers[f"{name.partition('/')[0]}/{stack}{depth:02}{rest}"] = float(number)
  return layers


def _stacked(name: str) -> tuple[str, int, int, str] | None:
  """What comes before the stack, segment, block, and what comes after."""
  path = name.partition("/")[2]
  match = re.fullmatch(rf"(.*?){STACK}\.(\d+)\.(\d+)(.*)", path)
  return match and (match[1], int(match[2]), int(match[3]), match[4])
