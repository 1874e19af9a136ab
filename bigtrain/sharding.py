"""Which mesh axis each dimension letter is sharded over: the only place that names mesh axes.

Axes: `data` (replicas, also across slices), `fsdp` (batch and parameters), `tensor` (heads, hidden,
vocabulary). An axis of size 1 costs nothing, so one table serves every topology. Without a mesh
every helper does nothing, and the same model code runs in a notebook on one device.

Letters: B batch, T query position, S key position, D model, K kv heads, G queries per kv head,
H head, F hidden, V vocabulary. A letter that is in no table is not sharded.
"""

import math

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from bigtrain.config import Refused, config

AXES = ("data", "fsdp", "tensor")
WEIGHT = {"D": "fsdp", "K": "tensor", "F": "tensor", "V": "tensor"}
ACTIVATION = {"B": ("data", "fsdp"), "K": "tensor", "F": "tensor", "V": "tensor"}
GATHERED = ("fsdp",)  # Weights are stored sharded over these axes and gathered where they are used.


@config
class Mesh:
  """How many devices each mesh axis spans. At most one axis may be -1: what the others leave."""

  data: int = 1  # Replicas of the parameters.
  fsdp: int = -1  # Shards of the batch, the parameters and the optimizer state.
  tensor: int = 1  # Shards of heads, hidden units and vocabulary.

  def shape(self, devices: int) -> dict[str, int]:
    """The size of every axis on that many devices.

    Raises:
      Refused: the axes do not multiply to `devices`, or more than one is -1.
    """
    sizes = {axis: getattr(self, axis) for axis in AXES}
    said = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
      raise Refused(f"mesh ({said}): sizes are positive, and one axis at most is -1 (what is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
      sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
      others = "the other axes" if free else "--mesh.fsdp -1 and the other axes"
      cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
      raise Refused(
        f"mesh wants {'a multiple of ' if free else ''}{fixed} devices ({said}) but {devices} "
        f"{'is' if devices == 1 else 'are'} attached; set {others} to a divisor of {devices} to "
        f"use what is there{f', or JAX_NUM_CPU_DEVICES={fixed} to try it on CPU' if cpu else ''}"
      )
    return sizes

  def make(self) -> jax.sharding.Mesh:
    """The mesh over all attached devices, every axis explicit."""
    sizes = self.shape(jax.device_count())
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))


def spec(table: dict, dims: str) -> P | None:
  """The partition spec of an array with these dimension letters; None without a mesh.

  Only explicit axes are named: an island's manual axes drop out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return None

  def explicit(axes) -> tuple[str, ...] | None:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(a for a in axes if a in mesh.explicit_axes) or None

  return P(*(explicit(table.get(d)) for d in dims))


def weight(dims: str) -> P | None:
  """The spec of a stored parameter."""
  return spec(WEIGHT, dims)


def act(dims: str) -> P | None:
  """The spec of an activation, or of a batch."""
  return spec(ACTIVATION, dims)


def lay(x, dims: str) -> jax.Array:
  """An activation of these dims, moved to where the table lays it."""
  return x if (spec := act(dims)) is None else jax.sharding.reshard(x, spec)


def spread(w) -> jax.Array:
  """A parameter without letters, over fsdp by its largest dim that divides, else replicated."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return w
  shards = math.prod(mesh.shape[axis] for axis in GATHERED)
  fits = [i for i, size in enumerate(w.shape) if size % shards == 0]
  place = [None] * w.ndim
  if fits:
    place[max(fits, key=lambda i: w.shape[i])] = GATHERED
  return jax.sharding.reshard(w, P(*place))


def mergeable(dims: str) -> bool:
  """Whether dims of an activation can become one without moving data: only the first is sharded."""
  return not any(act(dims[1:]) or ())


def merged(*groups: str) -> P | None:
  """The spec of an activation whose groups of (mergeable) dims have each become one dim."""
  return act("".join(group[0] for group in groups))


def axes(letter: str) -> tuple[str, ...]:
  """The mesh axes over which activations shard this dimension letter."""
  axes = ACTIVATION.get(letter) or ()
  return (axes,) if isinstance(axes, str) else axes


def batch_sharding() -> NamedSharding | None:
  """Of every array of a batch, (B, ...), on the mesh in force; None without one."""
  spec = act("B")
  return None if spec is None else NamedSharding(jax.sharding.get_mesh(), spec)


def axis_size(letter: str) -> int:
  """Over how many devices activations shard this dimension letter, in the mesh in force."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in axes(letter))


def use(w, dtype=None) -> jax.Array:
  """A stored parameter, cast to the compute dtype and then all-gathered over fsdp.

  The cast comes first, so that the gather moves the smaller type. The gradient is summed back onto
  the shards in that type, then cast to the parameter's.
  """
  w = w[...].astype(dtype or w.dtype)
  if jax.sharding.get_abstract_mesh().empty:
    return w
  return jax.sharding.reshard(w, P(*(_without_gathered(a) for a in jax.typeof(w).sharding.spec)))


def shared(x_BTD) -> jax.Array:
  """An activation that enters several products whose columns `tensor` splits.

  What these send back is added on each device before it is summed over the axis: one all-reduce
  serves them all.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = frozenset(a for a in axes("F") if a in mesh.explicit_axes and mesh.shape[a] > 1)
  return jax.sharding.reshard(x_BTD, P(*(act("BTD") or ()), reduced=split)) if split else x_BTD


def _without_gathered(axes):
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(a for a in axes if a not in GATHERED) or None


def dropout(x, rate, key: jax.Array | None, dims: int | None = None) -> jax.Array:
  """Zeroes with probability `rate` and scales the rest; the same bits on any mesh.

  What is zeroed is an element, or, with `dims`, all that lies at an index of the first dims.
  Without a key (evaluation) or at rate 0 it is the identity.
  """
  if key is None or (isinstance(rate, float) and rate == 0.0):
    return x
  shape = x.shape if dims is None else x.shape[:dims]
  out_sharding = None if act("") is None else P(*jax.typeof(x).sharding.spec[: len(shape)])
  keep = jax.random.bernoulli(key, 1.0 - rate, shape, out_sharding=out_sharding)
  keep = jnp.expand_dims(keep, range(len(shape), x.ndim))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
