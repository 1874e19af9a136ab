"""Rows that are cut: their positions laid over the mesh, and what must look across the cuts.

An objective cuts its batch (`cut`), and in what is traced there every array of positions is in
pieces. Over the axis `context` they are in zig-zag order (`zigzag.columns`), over `ulysses` in
their own. Positions and segments travel with their tokens and losses are sums, so that few places
need to know: attention, a neighbour's column, the first one.

Dims: B batch, T query position, S key position, D model, K kv heads, G queries per kv head, H head,
P distance.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from bigtrain import sharding, taps
from bigtrain.config import Refused, configs
from bigtrain.hints import to_set
from bigtrain.kernels import attention
from bigtrain.kernels.attention import Call
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.latent_attention import LatentAttentionConfig
from bigtrain.models.position import RelativeBuckets
from bigtrain.parallel import zigzag
from bigtrain.parallel.ring_attention import ring_attention


@contextlib.contextmanager
def cut(batch: dict[str, jax.Array]) -> Iterator[dict[str, jax.Array]]:
  """The batch with its rows of tokens laid over the mesh, where what is traced expects them so.

  Every device has whole rows of its batch: to cut them moves nothing.
  """
  if "tokens" not in batch:  # Images, or numbers: they have no positions.
    yield batch
    return
  with sharding.rows(cut=True):
    yield {name: _laid(x) if x.ndim == 2 else x for name, x in batch.items()}


def _laid(x_BT: jax.Array) -> jax.Array:
  mesh, (B, T) = jax.sharding.get_abstract_mesh(), x_BT.shape
  if not mesh.empty:
    check_length(T, mesh.shape)
  if sharding.cut_over() == "context":
    n = mesh.shape["context"]
    shaped = lambda x, *shape: jnp.reshape(x, shape, out_sharding=sharding.act("B"))
    pieces = shaped(x_BT, B, 2 * n, T // (2 * n))
    x_BT = shaped(pieces[:, zigzag.columns(2 * n, n)], B, T)
  return sharding.lay(x_BT, "BT")


def attend(call: Call) -> jax.Array:
  """`kernels.attention.attend` where rows are cut.

  Raises:
    Refused: as `check_model`.
  """
  axis = sharding.cut_over()
  if axis is None:  # Over `sequence` at most, which has given way to heads.
    with sharding.rows(cut=False):
      return attention.attend(call)
  q_BTKGH, k_BSKH, v_BSKH, queries, keys, form, bias_KGP, dropout, _ = call
  _check_attention(axis, dropout, bias_KGP is not None)
  if axis == "context":
    form = form._replace(aligned=False)  # Columns are in zig-zag order.
    return _island(functools.partial(ring_attention, form), q_BTKGH, k_BSKH, v_BSKH, queries, keys)
  exchanged = functools.partial(_exchanged, form)
  args = q_BTKGH, k_BSKH, v_BSKH, queries, keys, bias_KGP
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    y_BTKGH, found = exchanged(*args)
  else:
    out = jax.typeof(q_BTKGH).sharding.spec, P()
    y_BTKGH, found = sharding.island(exchanged, out, None)(*args)
  taps.hand_on(found)
  return y_BTKGH


def check_length(length: int, shape: Mapping[str, int]) -> None:
  """Refuses rows that a mesh of that shape cannot cut."""
  ring, exchanged, sequence = (shape[axis] for axis in ("context", "ulysses", "sequence"))
  unit = ring * math.lcm(2, sequence) if ring > 1 else exchanged * sequence
  if length % unit:
    below = length // unit * unit
    raise Refused(
      f"rows of {length} tokens cannot be cut over the mesh (context={ring * exchanged}, sequence="
      f"{sequence}), which takes multiples of {unit}{', two pieces a device' if ring > 1 else ''}; "
      f"use {f'{below} or ' if below else ''}{below + unit} tokens"
    )


def check_model(model: Any, shape: Mapping[str, int]) -> None:
  """Refuses a model's config with attention that has no form for a mesh of that shape."""
  axis = next((axis for axis in sharding.CONTEXT if shape[axis] > 1), None)
  nodes = [node for _, node in configs(model)]
  kinds = (AttentionConfig, LatentAttentionConfig)
  dropout = max((node.dropout for node in nodes if isinstance(node, kinds)), default=0.0)
  relative = any(isinstance(node, RelativeBuckets) for node in nodes)
  _check_attention(axis, dropout, relative)


def _check_attention(axis: str | None, dropout: float, relative: bool) -> None:
  if axis and dropout:
    raise Refused(
      f"attention.dropout is {dropout}, but over mesh.context attention does not drop weights; set "
      f"it to 0 (the other dropouts may stay), or {to_set('mesh.context', 1)}"
    )
  if axis == "context" and relative:
    raise Refused(
      "relative biases go by the columns of whole rows, of which each device has pieces in a ring; "
      f"set {to_set('mesh.ulysses', True)}, or {to_set('mesh.context', 1)}"
    )


def _exchanged(form, q_BTKGH, k_BSKH, v_BSKH, queries, keys, bias_KGP) -> tuple[jax.Array, Any]:
  """Attention of some heads over whole rows, between two exchanges (arXiv:2309.14509), and what was
  tapped in it."""
  heads, positions = 2, 1
  swap = functools.partial(jax.lax.all_to_all, axis_name="ulysses", tiled=True)
  whole = lambda x: swap(x, split_axis=heads, concat_axis=positions)
  gather = lambda x: jax.lax.all_gather(x, "ulysses", axis=positions, tiled=True)
  queries, keys = jax.tree.map(gather, (queries, keys))
  q_BTKGH, k_BSKH, v_BSKH = map(whole, (q_BTKGH, k_BSKH, v_BSKH))
  if bias_KGP is not None:
    size = k_BSKH.shape[heads]
    first = size * jax.lax.axis_index("ulysses")
    bias_KGP = jax.lax.dynamic_slice_in_dim(bias_KGP, first, size)
  with sharding.rows(cut=False):
    call = Call(q_BTKGH, k_BSKH, v_BSKH, queries, keys, form, bias_KGP)
    y_BTKGH, found = taps.collected(attention.attend)(call)
  return swap(y_BTKGH, split_axis=positions, concat_axis=heads), taps.over_devices(found)


def before(x_BT: jax.Array) -> jax.Array:
  """What stands one column earlier, (B, T, ...); zeros in the first column."""
  spec, axis = jax.typeof(x_BT).sharding.spec, sharding.cut_over()
  sequence = "sequence" in sharding.split_over(x_BT)
  if sequence:  # Once a step: the embedding alone is shifted.
    x_BT = sharding.gathered(x_BT, ("sequence",), ())
  if axis is None:
    x_BT = _moved_on(x_BT, jnp.zeros_like(x_BT[:, :1]))
  else:
    x_BT = _island(_before if axis == "context" else _before_in_order, x_BT)
  return jax.sharding.reshard(x_BT, spec) if sequence else x_BT


def _before(x_BT: jax.Array) -> jax.Array:
  n, me = jax.lax.axis_size("context"), jax.lax.axis_index("context")
  low, high = jnp.split(x_BT, 2, axis=1)
  up = [(i, i + 1) for i in range(n - 1)]
  down = [(i + 1, i) for i in range(n - 1)]
  low_before = jax.lax.ppermute(low[:, -1:], "context", up)
  high_before = jax.lax.ppermute(high[:, -1:], "context", down)
  high_before = jnp.where(me == n - 1, low[:, -1:], high_before)
  return jnp.concatenate([_moved_on(low, low_before), _moved_on(high, high_before)], axis=1)


def _before_in_order(x_BT: jax.Array) -> jax.Array:
  up = [(i, i + 1) for i in range(jax.lax.axis_size("ulysses") - 1)]
  return _moved_on(x_BT, jax.lax.ppermute(x_BT[:, -1:], "ulysses", up))


def _moved_on(x_BT: jax.Array, first_B1: jax.Array) -> jax.Array:
  return jnp.concatenate([first_B1, x_BT[:, :-1]], axis=1)


def first(x_BTD: jax.Array) -> jax.Array:
  """The first column, (B, ...)."""
  if not sharding.split_over(x_BTD) - sharding.split_over(x_BTD, 1):
    return x_BTD[:, 0]
  # It lies first in every order. An index into a dim that is cut would gather all of it.
  first_T = jnp.expand_dims(jnp.arange(x_BTD.shape[1]) == 0, range(1, x_BTD.ndim - 1))
  return jnp.where(first_T, x_BTD, 0).sum(1)


def _island(local: Callable, *args: Any) -> Any:
  """`local` of each device's part; the result is like the first argument, and laid as that.

  Inside an island that is there already it just runs: they do not nest.
  """
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return local(*args)
  return sharding.island(local, jax.typeof(args[0]).sharding.spec, args[0])(*args)
