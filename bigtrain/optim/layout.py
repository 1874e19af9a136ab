"""What the dims of a parameter are: a stack of layers, then a matrix's rows and its columns.

A name ends in the letters of its own dims: `q_DKGH` has four. What the array has in front of them
numbers layers, and each layer is a parameter of its own; so is each expert (E) of a layer. Of the
own dims, the rows are those that the product contracts with its input (`D` of `q_DKGH`, `KGH` of
`o_KGHD`, `F` of `down_FD`), the columns those that it makes. A name without letters, of a foreign
module, is one layer whose last dim is the columns: (inputs, outputs), or (height, width, inputs,
outputs) of a convolution. Biases and scales have no rows: they are vectors, whatever their shape.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import P

VECTOR = re.compile("bias|scale")
# Of look-up tables and of what meets inputs and outputs: by name, or by a letter of what does not
# grow with a model (vocabulary, position, token type, query, pixels, inputs, classes, bucket).
TABLES = r"embed|position|table|_[A-Z]*[VTYQPICR]"
LETTERS = re.compile(r"_([A-Z][A-Za-z]*)\W*(\.value)?\W*$")


class Layout(NamedTuple):
  """How many dims are what; the columns are the rest."""

  stack: int  # Layers.
  rows: int  # 0 of a vector.

  def axes(self, w) -> tuple[int, ...]:
    """The dims of one layer."""
    return tuple(range(self.stack, w.ndim))

  def row_axes(self) -> tuple[int, ...]:
    return tuple(range(self.stack, self.stack + self.rows))

  def column_axes(self, w) -> tuple[int, ...]:
    return tuple(range(self.stack + self.rows, w.ndim))

  def sides(self, w) -> tuple[int, int]:
    """Rows and columns of a layer's matrix."""
    size = lambda axes: math.prod(w.shape[i] for i in axes)
    return size(self.row_axes()), size(self.column_axes(w))


def layout(path, w) -> Layout:
  """The layout of the parameter `w` at a key path of its tree."""
  name = jax.tree_util.keystr(path)
  found = LETTERS.search(name)
  letters = found[1].removeprefix("E") if found and len(found[1]) <= w.ndim else None
  stack = w.ndim - len(letters) if letters else 0
  own = w.ndim - stack
  if own < 2 or VECTOR.search(name.removesuffix(".value").rpartition(".")[2]):
    return Layout(stack, 0)
  return Layout(stack, 1 if letters and letters[0] in "DL" else own - 1)


def map_layers(function: Callable, tree, *rest):
  """`function(layout, leaf, *leaves)` over trees of parameters, or of what is shaped like them."""
  return jax.tree_util.tree_map_with_path(
    lambda p, w, *o: function(layout(p, w), w, *o), tree, *rest
  )


def is_matrix(path, w, spared: str | None) -> bool:
  """Whether a parameter is a matrix, and `spared` is not found in its path."""
  named = spared is not None and re.search(spared, jax.tree_util.keystr(path))
  return layout(path, w).rows > 0 and not named


def matrices_by(
  matrix: optax.GradientTransformation, rest: optax.GradientTransformation, spared: str | None
) -> optax.GradientTransformation:
  """One transformation for matrices, another for all else and for what `spared` is found in."""
  label = lambda path, w: "matrix" if is_matrix(path, w, spared) else "rest"
  labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
  return optax.partition({"matrix": matrix, "rest": rest}, labels)


def spread(function: Callable, like: tuple, *stacks: jax.Array) -> Any:
  """`function` of stacks of layers, (L, ...) each, with every layer whole on one device.

  The layers are dealt out over all devices of the mesh, so that what is done to a matrix needs no
  communication; no device holds more than ceil(L / devices) of them.

  Args:
    function: of the stacks of a device, which may have fewer or more layers; returns a tuple.
    like: arrays with the shardings that the results shall have.
    stacks: arrays of L layers.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(*stacks)
  layers, dealt, reshard = len(stacks[0]), P(mesh.axis_names), jax.sharding.reshard
  more = -layers % mesh.size
  spec = lambda x: jax.typeof(x).sharding.spec
  # A dim that is sharded, as that of layers on stages is, can be neither padded nor cut.
  whole = lambda x: P(None, *spec(x)[1:]) if more else spec(x)
  pad = lambda x: jnp.pad(reshard(x, whole(x)), ((0, more),) + ((0, 0),) * (x.ndim - 1))
  local = jax.shard_map(function, in_specs=dealt, out_specs=dealt)
  results = local(*(reshard(pad(x), dealt) for x in stacks))
  back = lambda y, x: reshard(reshard(y, whole(x))[:layers], spec(x))
  return tuple(map(back, results, like))
