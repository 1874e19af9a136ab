"""Which mesh axis each dimension letter is sharded over, and how parameters are gathered.

Layers know letters, not axes. An axis of size 1 costs nothing, so one table serves every topology.
Without a mesh every helper does nothing, and the same code runs in a notebook on one device.

Letters: B batch, T query position, S key position, D model, K kv heads, G queries per kv head,
H head, F hidden, L latent, V vocabulary, E expert. A letter that is in no table is not sharded.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from bigtrain.mesh import AXES

CONTEXT = ("context", "ulysses")  # One or the other: see mesh.OTHER_NAMES.
SPLIT = ("tensor", "sequence")  # The same.
# Parameters are stored sharded over these axes and gathered where they are used.
GATHERED = ("pipeline", "fsdp", "expert", *CONTEXT)
# Layers of a stack are dealt to stages; to what is outside of them `pipeline` is more fsdp.
STAGES = ("pipeline",)
WEIGHT = {"E": ("expert",), "D": GATHERED, "L": GATHERED, "K": SPLIT, "F": SPLIT, "V": SPLIT}
ACTIVATION = {
  "B": (*STAGES, "slices", "data", "fsdp", "expert"),
  "E": ("expert",),
  "K": SPLIT,
  "F": SPLIT,
  "V": SPLIT,
  "T": (*CONTEXT, "sequence"),  # Where rows are cut.
  "S": (*CONTEXT, "sequence"),
}
POSITIONS = {"T", "S"}
EXCHANGED = {"K": (*SPLIT, "ulysses")}  # Of attention, which has exchanged positions for heads.
_cut: contextvars.ContextVar[bool] = contextvars.ContextVar("cut", default=False)


def spec(table: Mapping[str, tuple[str, ...]], dims: str) -> P | None:
  """The partition spec of an array with these dimension letters; None without a mesh.

  An axis shards one dim. Of those that want it the one that comes first in the table gets it: heads
  before positions. Only explicit axes are named: an island's manual axes drop out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return None
  free, found = _free(mesh.explicit_axes), {}
  for letter in sorted(set(dims) & table.keys(), key=list(table).index):
    found[letter] = tuple(a for a in table[letter] if a in free and mesh.shape[a] > 1)
    free -= set(found[letter])
  return P(*(found.get(letter) or None for letter in dims))


def weight(dims: str) -> P | None:
  """The spec of a stored parameter."""
  return spec(WEIGHT, dims)


def act(dims: str) -> P | None:
  """The spec of an activation, or of a batch.

  Positions are sharded where rows are cut alone. What is of a token as a whole, such as its id, is
  not sharded over `sequence`: attention wants the ids of all, and to slice them costs nothing.
  """
  table = ACTIVATION
  if not _cut.get():
    table = {letter: axes for letter, axes in table.items() if letter not in POSITIONS}
  elif POSITIONS.union("B").issuperset(dims):
    table = {**table, "T": CONTEXT, "S": CONTEXT}
  return spec(table, dims)


@contextlib.contextmanager
def rows(*, cut: bool) -> Iterator[None]:
  """Whether the positions of rows are laid over the mesh in what is traced here.

  They are not, unless an objective says so: what is sampled or called by hand has rows of any
  length. Backward passes are traced later, outside: they take their sharding from types.
  """
  token = _cut.set(cut)
  try:
    yield
  finally:
    _cut.reset(token)


def rows_are_cut() -> bool:
  """As `rows` says; also on a mesh where that lays them over one device."""
  return _cut.get()


def cut_over() -> str | None:
  """The axis of `CONTEXT` over which rows are cut here, if there is one."""
  mesh = jax.sharding.get_abstract_mesh()
  wide = [axis for axis in CONTEXT if not mesh.empty and mesh.shape[axis] > 1]
  return wide[0] if wide and _cut.get() else None


def lay(x, dims: str) -> jax.Array:
  """An activation of these dims, moved to where the table lays it."""
  return x if (spec := act(dims)) is None else jax.sharding.reshard(x, spec)


def spread(w) -> jax.Array:
  """A parameter without letters, over fsdp by its largest dim that divides, else replicated."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return w
  over = tuple(axis for axis in GATHERED if mesh.shape[axis] > 1)
  shards = math.prod(mesh.shape[axis] for axis in over)
  fits = [i for i, size in enumerate(w.shape) if size % shards == 0]
  place = [None] * w.ndim
  if fits:
    place[max(fits, key=lambda i: w.shape[i])] = over or None
  return jax.sharding.reshard(w, P(*place))


def stacked(layers) -> Any:
  """Stacked parameters, (L, ...) each, with the layers dealt to the stages if these divide them.

  Each stage has neighbouring layers, in the order of depth.
  """
  mesh = jax.sharding.get_abstract_mesh()
  stages = math.prod(mesh.shape[axis] for axis in STAGES) if not mesh.empty else 1

  def lay(w):
    if stages == 1 or len(w) % stages:
      return w
    inner = [tuple(a for a in _tuple(dim) if a not in STAGES) or None for dim in _spec(w)[1:]]
    return jax.sharding.reshard(w, P(STAGES, *inner))

  return jax.tree.map(lay, layers)


def mergeable(*groups: str) -> bool:
  """Whether each group of an activation's dims can become one dim without moving data: in each no
  dim but the first is sharded."""
  spec, dims = act("".join(groups)), itertools.count()
  split = [[bool(spec and spec[next(dims)]) for _ in group] for group in groups]
  return not any(any(group[1:]) for group in split)


def merged(*groups: str) -> P | None:
  """The spec of an activation whose groups of (mergeable) dims have each become one dim."""
  return act("".join(group[0] for group in groups))


def before_sum(dims: str, summed: str) -> P | None:
  """The spec of a product of these dims before it is summed over devices.

  That is `act(dims)`, except where an axis splits both the dims that were contracted (`summed`) and
  one that stays: there each device has a part of every sum, until `scattered` adds these up.
  """
  spec = act(dims)
  if spec is None:
    return None
  both = axes_of(act(summed) or ()) & axes_of(spec)
  kept = (tuple(a for a in _tuple(dim) if a not in both) or None for dim in spec)
  return P(*kept, unreduced=both)


def scattered(x, dims: str) -> jax.Array:
  """A product of these dims as `act` lays it: sums that `before_sum` left are reduce-scattered."""
  spec, parts = act(dims), jax.typeof(x).sharding.spec.unreduced
  if spec is None or not parts:
    return x

  def scatter(x):
    for dim, axes in enumerate(spec):
      for axis in _tuple(axes):
        if axis in parts:
          x = jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    return x

  return island(scatter, spec, x)(x)


def axes(letter: str) -> tuple[str, ...]:
  """The mesh axes over which activations shard this dimension letter, of those that exist here."""
  return within(ACTIVATION.get(letter, ()))


def within(axes: Iterable[str]) -> tuple[str, ...]:
  """Those of the axes that exist here: a stage knows nothing of the axis of stages."""
  free = _free(axes)
  return tuple(axis for axis in axes if axis in free)


def batch_sharding() -> NamedSharding | None:
  """Of every array of a batch, (B, ...), on the mesh in force; None without one."""
  spec = act("B")
  return None if spec is None else NamedSharding(jax.sharding.get_mesh(), spec)


def axis_size(letter: str) -> int:
  """Over how many devices activations shard this dimension letter, in the mesh in force."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in axes(letter))


def use(w, dims: str, dtype=None, over: Iterable[str] = ()) -> jax.Array:
  """A stored parameter with these dimension letters, cast and then all-gathered.

  The cast comes first, so that the gather moves the smaller type. Inside an island it gathers over
  the axes that are manual, and the gradient is scattered back. Experts (E) stay where they are.

  Args:
    w: the parameter.
    dims: its letters.
    dtype: the compute dtype; None for its own.
    over: the axes that split the rows it is multiplied with, or the indices it is looked up by
      (`split_over`). Each device has a part of the gradient, and these parts are summed as they
      should be: a reduce-scatter over each axis that was gathered, then a sum over the others, the
      slowest last. Without any, as of a scale, the gradient is whole on every device.
  """
  w = w[...].astype(dtype or w.dtype)
  manual = _free(jax.sharding.get_abstract_mesh().manual_axes)
  move = [axis for axis in GATHERED if not ("E" in dims and axis in WEIGHT["E"])]
  for dim, letter in enumerate(dims):
    here = [a for a in WEIGHT.get(letter, ()) if a in move and a in manual]
    for axis in reversed(here):
      w = jax.lax.all_gather(w, axis, axis=dim, tiled=True)
  return gathered(w, move, over)


def split_over(x, dims: int | None = None) -> frozenset[str]:
  """The explicit axes that shard any of the first `dims` dims of an array; None for all of them."""
  return axes_of(_spec(x)[:dims])


def gathered(x, axes: Iterable[str], over: Iterable[str]) -> jax.Array:
  """An array with none of its dims sharded over `axes`, all-gathered axis by axis.

  Its gradient is the sum of a part that each device has along the axes `over`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = jax.typeof(x).sharding.spec
  whole = [tuple(a for a in _tuple(dim) if a not in axes) or None for dim in spec]
  over = [axis for axis in AXES if axis in over and mesh.shape[axis] > 1]
  if not over:
    return jax.sharding.reshard(x, P(*whole))
  # First those along which the gradient is whole: jax cannot slice one that is still to be summed.
  if alone := axes_of(spec.partitions) & set(axes) - set(over):
    left = (tuple(a for a in _tuple(dim) if a not in alone) or None for dim in spec)
    x = jax.sharding.reshard(x, spec := P(*left, reduced=spec.reduced))

  def gather(x):
    moved = {axis for dim in spec for axis in _tuple(dim) if axis in axes}
    for axis in over:  # In the backward pass these come in reverse, and after the gathers.
      if axis not in moved:
        x = jax.lax.pcast(x, axis, to="reduced")
    for i, dim in enumerate(spec):
      for axis in reversed([a for a in _tuple(dim) if a in moved]):
        x = jax.lax.all_gather(x, axis, axis=i, tiled=True, to="reduced")
    return x

  out = P(*whole, reduced=frozenset(over) | spec.reduced)
  return island(gather, out, x)(x)


def island(function: Callable, out_specs, results, *, opaque: bool = False) -> Callable[..., Any]:
  """`function` of what each device has of its arguments: `jax.shard_map` over all axes.

  Within a stage (parallel/pipeline.py) it is one over all stages: jax's own vmap of a shard_map
  leaves their axis out, and such a partly manual island can neither scatter nor hold kernels.

  Args:
    function: of arrays, which it does not close over.
    out_specs: of its results.
    results: arrays, or shapes and dtypes, as large as the results are on all devices together;
      None where only the function itself can tell.
    opaque: the function does not tell over which axes its values vary.
  """
  specs_of = lambda args: jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
  over_all = functools.partial(jax.shard_map, check_vma=not opaque)
  plain = lambda *args: over_all(function, in_specs=specs_of(args), out_specs=out_specs)(*args)
  if (ids_B := _rows.get()) is None:
    return plain

  @jax.custom_batching.custom_vmap
  def of_stage(*args):
    like = jax.eval_shape(plain, *args) if results is None else results
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.sharding.reshard(zeros, out_specs)  # For its type alone; the rule is what runs.

  @of_stage.def_vmap
  def of_all_stages(stages: int, is_mapped, *args):
    def local(*args):
      args = jax.tree.map(lambda x, mapped: x[0] if mapped else x, args, (*is_mapped,))
      with stage(ids_B):  # Also where this is traced later.
        return jax.tree.map(lambda x: x[None], function(*args))

    staged = lambda spec: spec.update(partitions=(STAGES, *spec.partitions))
    specs = jax.tree.map(staged, out_specs, is_leaf=lambda x: isinstance(x, P))
    found = over_all(local, in_specs=specs_of(args), out_specs=specs)(*args)
    return found, jax.tree.map(lambda x: True, found)

  return of_stage


def shared(x_BTD) -> jax.Array:
  """An activation that enters several products whose columns `tensor` splits, with all positions.

  What these send back is added on each device before it is summed over the axis: one all-reduce
  serves them all, or, where the axis shards the positions too, one reduce-scatter.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = frozenset(a for a in SPLIT if a in mesh.explicit_axes and mesh.shape[a] > 1)
  if not split:
    return x_BTD
  if "sequence" in split_over(x_BTD):
    return gathered(x_BTD, SPLIT, split)
  return jax.sharding.reshard(x_BTD, P(*(act("BTD") or ()), reduced=split))


def _tuple(axes) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else axes or ()


def axes_of(partitions) -> frozenset[str]:
  """The axes that shard any of these dims."""
  return frozenset(axis for axes in partitions for axis in _tuple(axes))


def _spec(x) -> tuple:
  """What shards each dim."""
  return jax.typeof(x).sharding.spec.partitions


_rows: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def stage(ids_B: jax.Array) -> Iterator[None]:
  """Within, the code of one stage of a pipeline, which knows nothing of the others.

  Row i of an activation is row `ids_B[i]` of the batch.
  """
  token = _rows.set(ids_B)
  try:
    yield
  finally:
    _rows.reset(token)


def _free(axes: Iterable[str]) -> set[str]:
  """Those of the axes that specs may name here."""
  return set(axes) - (set(STAGES) if _rows.get() is not None else set())


_every: contextvars.ContextVar[tuple[int, Any]] = contextvars.ContextVar("every", default=(1, 0))


@contextlib.contextmanager
def every(n: int, m) -> Iterator[None]:
  """Within, there is a microbatch: the rows m, m + n, m + 2n, ... of the batch."""
  token = _every.set((n, m))
  try:
    yield
  finally:
    _every.reset(token)


def of_microbatch(key: jax.Array) -> jax.Array:
  """A key that the other microbatches of the batch do not have, for what is not drawn by rows."""
  n, m = _every.get()
  return key if n == 1 else jax.random.fold_in(key, m)


def row_ids(x) -> jax.Array:
  """Where in the batch each row of an activation (B, ...) is: a stage has a microbatch alone."""
  if (ids_B := _rows.get()) is None:
    n, m = _every.get()
    ids_B = jnp.arange(len(x), out_sharding=act("B") and P(_spec(x)[0])) * n + m
  return ids_B
