"""Tokens travel to their experts and back: an island, manual over every axis of the mesh.

A device sends each of its tokens to the devices that hold its experts, along the axis that shards
E. Nothing here is learned: what an expert computes is a function that is handed in.

Dims: B batch, T position, D model, A choices of a token, X all experts, E experts of this device,
N = B * T tokens of this device, M = A * N their choices, n devices along the axis, G groups of
choices, C slots of a group, R slots of a buffer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.mesh import ordered, platform
from bigtrain.precision import raised

# What experts compute: (rows, factors, weights, sizes). Rows are (R, D), sorted by expert, so many
# of each, or, where sizes are None, (E, C, D); factors have D = 1, and multiply what comes out.
Network = Callable[[jax.Array, jax.Array, Any, jax.Array | None], jax.Array]


@config
class Dropless:
  """Every expert takes what comes, by grouped matrix products (MegaBlocks, arXiv:2211.15841)."""

  # Rows that a device has room for, in multiples of what it sends: where experts are even, it
  # receives as many. What does not fit is left out and counted as overflow. None: room for the
  # worst case, all tokens of all devices along the axis, so that nothing is ever left out.
  buffer: float | None = None
  # How rows travel: `ragged` sends what there is, `all_to_all` fills equal slots for each pair of
  # devices; `auto` is ragged but on CPU, which has it not: there it is made of a gather.
  exchange: Literal["auto", "ragged", "all_to_all"] = "auto"

  def check(self) -> None:
    if self.buffer is not None and self.buffer < 1:
      raise Refused(f"buffer is {self.buffer}; even experts need 1, and some room above, as 1.5")


@config
class Capacity:
  """Every expert takes so many tokens of each row of the batch, by dense products (GShard).

  What comes later in the row, or as a later choice, is left out and counted as overflow
  (arXiv:2006.16668). Rows are filled alike on any mesh whose axes do not cut them.
  """

  factor: float = 1.25  # Slots, in multiples of an even share.

  def check(self) -> None:
    if self.factor <= 0:
      raise Refused(f"factor is {self.factor}; it is positive, and above 1 for experts with room")


def through_experts(
  c: Dropless | Capacity, network: Network, x_BTD, weights_BTA, choice_BTA, experts: int, w
) -> tuple[jax.Array, jax.Array]:
  """The weighted sum of what each token's experts make of it, and how many choices overflowed.

  The factor of a choice travels with its token. What comes back is only added up, and to
  differentiate that nothing of it is needed: where the backward pass computes the experts again,
  their last product and the way back are left out.

  Args:
    c: how tokens find their way.
    network: what experts compute.
    x_BTD: tokens, `sharding.shared`.
    weights_BTA: the factor of each choice, `sharding.shared`.
    choice_BTA: int32 experts, of which no token names one twice; `experts` for none.
    experts: how many there are in all, X.
    w: weights (E, ...), gathered but for E and what `tensor` splits: parts of the network's result
      are summed over that here.

  Returns:
    (B, T, D) in the dtype of `x`, and a float32 scalar: choices that had no room, of all devices.
  """
  arrays = (x_BTD, weights_BTA, choice_BTA, w)
  local = functools.partial(_local, c, network, experts)
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return local(*arrays)  # No mesh, or already inside an island: those do not nest.
  results = x_BTD, jax.ShapeDtypeStruct((), jnp.float32)
  return sharding.island(local, (sharding.act("BTD"), P()), results)(*arrays)


def _local(c: Dropless | Capacity, network: Network, X: int, x_BTD, weights_BTA, choice_BTA, w):
  """What one device does with its tokens and its experts."""
  x_BTD, weights_BTA, w = jax.tree.map(_varying, (x_BTD, weights_BTA, w))
  (B, T, D), A = x_BTD.shape, choice_BTA.shape[-1]
  choice_M = jnp.moveaxis(choice_BTA, 2, 0).reshape(-1)  # First choices come first.
  factor_M1 = jnp.moveaxis(weights_BTA, 2, 0).reshape(-1, 1)
  given = (network, X, x_BTD, factor_M1, choice_M, w)
  z_MD, dropped = _dense(c, *given) if isinstance(c, Capacity) else _dropless(c, *given)
  y_ND = z_MD.reshape(A, -1, D).sum(0, dtype=raised(z_MD.dtype))
  y_BTD = y_ND.astype(x_BTD.dtype).reshape(B, T, D)
  for axis in filter(_spread, sharding.axes("F")):
    if axis in sharding.axes("T"):
      y_BTD = jax.lax.psum_scatter(y_BTD, axis, scatter_dimension=1, tiled=True)
    else:
      y_BTD = jax.lax.psum(y_BTD, axis)
  batch = filter(_spread, (*sharding.axes("B"), *sharding.axes("T")))
  over = tuple(axis for axis in batch if axis in jax.typeof(dropped).mat.varying)
  return y_BTD, jax.lax.psum(dropped.astype(jnp.float32), over)


def _dense(c: Capacity, network: Network, X: int, x_BTD, factor_M1, choice_M, w):
  """Each expert's slots for each row of the batch, by way of one equal exchange."""
  (B, T, D), M = x_BTD.shape, len(choice_M)
  A, n = M // (B * T), _size(*_axis())
  C = min(math.ceil(c.factor * T * A / X), T)
  row_M = jnp.arange(M) % (B * T) // T
  group_M = jnp.where(choice_M < X, row_M * X + choice_M, B * X)
  order_M, start_G = _sorted(group_M, B * X)
  slots = _slots(order_M, group_M, start_G, C)

  def there(rows_RD):
    # The devices' experts lie side by side: (B, X) is (B, n, E).
    rows = _all_to_all(rows_RD.reshape(B, n, X // n, C, -1), 1)
    return jnp.transpose(rows, (2, 0, 1, 3, 4)).reshape(X // n, B * n * C, -1)

  rows = map(there, _rows(slots, x_BTD.reshape(-1, D), factor_M1))
  y_ECD = network(*_received(rows), w, None)
  y_BnECD = jnp.transpose(y_ECD.reshape(X // n, B, n, C, D), (1, 2, 0, 3, 4))
  y_RD = _all_to_all(y_BnECD, 1).reshape(-1, D)
  dropped = jnp.maximum(jnp.diff(start_G) - C, 0).sum()
  return _take(y_RD, slots.of_choice_M, slots.choice_R[:, None]), dropped


def _dropless(c: Dropless, network: Network, X: int, x_BTD, factor_M1, choice_M, w):
  """Rows sorted by expert; where experts are spread, sent to them and sorted again."""
  x_ND, M = x_BTD.reshape(-1, x_BTD.shape[-1]), len(choice_M)
  n = _size(*_axis())
  order_M, start_X = _sorted(choice_M, X)
  count_X, real_M = jnp.diff(start_X), choice_M < X
  ragged = n > 1 and (c.exchange == "ragged" or (c.exchange == "auto" and platform() != "cpu"))
  if n == 1 or ragged:  # One group, of all that have an expert.
    slots = _slots(order_M, jnp.where(real_M, 0, 1), start_X[::X], M)
  else:
    C = M if c.buffer is None else min(M, math.ceil(c.buffer * M / n))
    slots = _slots(order_M, choice_M // (X // n), start_X[:: X // n], C)
  rows = _rows(slots, x_ND, factor_M1)
  if n == 1:
    y_RD, kept = network(*_received(rows), w, count_X), start_X[-1]
  elif ragged:
    room = n * M if c.buffer is None else min(n * M, math.ceil(c.buffer * M))
    y_RD, kept = _ragged(_of_device(c, network), rows, count_X, room, w)
  else:
    y_RD, kept = _in_slots(_of_device(c, network), rows, count_X, C, w)
  dropped = start_X[-1] - kept
  return _take(y_RD, slots.of_choice_M, slots.choice_R[:, None]), dropped


def _of_device(c: Dropless, network: Network) -> Callable:
  """`_sorted_network`, but of one expert whose rows are most of the buffer: all are its own then.

  What is behind them is zero, and stays so.
  """
  if c.buffer is None:
    return functools.partial(_sorted_network, network)

  def of_device(rows, count_nE, rest_n, w):
    if count_nE.shape[1] > 1:
      return _sorted_network(network, rows, count_nE, rest_n, w)
    x_RD, factor_R1 = _received(rows)
    return network(x_RD[None], factor_R1[None], w, None)[0]

  return of_device


def _in_slots(network: Callable, rows, count_X, C: int, w):
  """Every pair of devices exchanges C rows, used or not."""
  counts = _counts(count_X)
  kept_nn = jnp.minimum(counts.of_pair_nn, C)
  exchanged = lambda a_RD: _all_to_all(a_RD.reshape(-1, C, a_RD.shape[1]), 0).reshape(a_RD.shape)
  kept_nE = counts.first(kept_nn)
  y_RD = network([*map(exchanged, rows)], kept_nE, C - kept_nE.sum(1), w)
  return exchanged(y_RD), kept_nn[counts.me].sum()


def _ragged(network: Callable, rows, count_X, room: int, w):
  """Every pair of devices exchanges the rows there are, as far as there is room for them."""
  counts = _counts(count_X)
  count_nn, me = counts.of_pair_nn, counts.me
  before_nn = jnp.cumsum(count_nn, 0) - count_nn  # Rows at the receiver from earlier senders.
  kept_nn = jnp.clip(room - before_nn, 0, count_nn)
  at_nn, from_nn = jnp.minimum(before_nn, room), jnp.cumsum(count_nn, 1) - count_nn
  kept_nE = counts.first(kept_nn)
  rest_n = jnp.zeros_like(kept_nE[:, 0]).at[-1].set(room - kept_nE.sum())
  there = (from_nn[me], kept_nn[me], at_nn[me], kept_nn[:, me])
  exchanged = [_ragged_all_to_all(a_MD, room, *there) for a_MD in rows]
  y_RD = network(exchanged, kept_nE, rest_n, w)
  back = (at_nn[:, me], kept_nn[:, me], from_nn[:, me], kept_nn[me])
  return _ragged_all_to_all(y_RD, len(rows[0]), *back), kept_nn[me].sum()


class Counts(NamedTuple):
  """How many rows every device has for every other, known to all."""

  of_pair_nn: jax.Array  # By sender and receiver.
  mine_nE: jax.Array  # What each sender has for the experts here.
  me: jax.Array

  def first(self, kept_nn) -> jax.Array:
    """By sender and expert, the first so many rows of those that are meant for this device."""
    before_nE = jnp.cumsum(self.mine_nE, 1) - self.mine_nE
    return jnp.clip(kept_nn[:, self.me, None] - before_nE, 0, self.mine_nE)


def _counts(count_X) -> Counts:
  (axis,) = _axis()
  n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  count_nnE = jax.lax.all_gather(count_X, axis).reshape(n, n, -1)
  return Counts(count_nnE.sum(2), count_nnE[:, me], me)


def _sorted_network(network: Network, rows, count_nE, rest_n, w) -> jax.Array:
  """The network on rows that lie sender by sender, and of each by expert, then `rest` unused."""
  E, R = count_nE.shape[1], len(rows[0])
  end_Q = jnp.cumsum(jnp.concatenate([count_nE, rest_n[:, None]], 1).reshape(-1))
  expert_R = jnp.searchsorted(end_Q, jnp.arange(R), side="right", method="compare_all")
  order_R = jnp.argsort(expert_R % (E + 1))
  back_R = jnp.argsort(order_R)
  rows = _received(_take(a, order_R, back_R[:, None]) for a in rows)
  y_RD = network(*rows, w, count_nE.sum(0))
  return _take(y_RD, back_R, order_R[:, None])


def _received(rows) -> tuple[jax.Array, jax.Array]:
  """Rows and factors as experts take them, with the name by which a remat policy keeps them."""
  x_RD, factor_R1 = rows
  return checkpoint_name(x_RD, "received"), checkpoint_name(factor_R1, "received")


class Slots(NamedTuple):
  """Which choice lies in which slot, both ways."""

  choice_R: jax.Array  # M where a slot is empty.
  of_choice_M: jax.Array  # R where a choice has none.


def _sorted(group_M, G: int) -> tuple[jax.Array, jax.Array]:
  """The order of choices by group, and where each of G groups begins in it, and the last ends."""
  order_M = jnp.argsort(group_M)
  return order_M, jnp.searchsorted(group_M[order_M], jnp.arange(G + 1)).astype(jnp.int32)


def _slots(order_M, group_M, start_G, C: int) -> Slots:
  """C slots for each group, filled by its choices in order; those of no group come last."""
  M, G = len(order_M), len(start_G) - 1
  slot_R = jnp.arange(G * C)
  at_R = start_G[slot_R // C] + slot_R % C
  choice_R = jnp.where(at_R < start_G[slot_R // C + 1], order_M.at[at_R].get(mode="clip"), M)
  rank_M = jnp.argsort(order_M) - start_G.at[group_M].get(mode="clip")
  fits_M = (group_M < G) & (rank_M < C)
  return Slots(choice_R, jnp.where(fits_M, group_M * C + rank_M, G * C))


def _rows(slots: Slots, x_ND, factor_M1) -> tuple[jax.Array, jax.Array]:
  """The token in each slot, (R, D), and its factor, (R, 1)."""
  N, M = len(x_ND), len(factor_M1)
  token_R = jnp.where(slots.choice_R < M, slots.choice_R % N, N)
  x_RD = _take(x_ND, token_R, slots.of_choice_M.reshape(-1, N).T)
  return x_RD, _take(factor_M1, slots.choice_R, slots.of_choice_M[:, None])


@jax.custom_vjp
def _take(x_N, index_R, back_NA) -> jax.Array:
  """Rows of x by index, zeros where it points behind the last.

  `back_NA` says where each row of x has gone (or points behind the last), so that its gradient is
  read there; autodiff would write it row by row.
  """
  del back_NA
  return x_N.at[index_R].get(mode="fill", fill_value=0)


def _take_backward(back_NA, dy_R):
  return dy_R.at[back_NA].get(mode="fill", fill_value=0).sum(1), None, None


_take.defvjp(lambda x, index, back: (_take(x, index, back), back), _take_backward)


def _axis() -> tuple[str, ...]:
  """The axis over which experts are spread here; none where a device has them all."""
  return tuple(filter(_spread, sharding.axes("E")))


def _spread(axis: str) -> bool:
  mesh = jax.sharding.get_abstract_mesh()
  return axis in mesh.manual_axes and mesh.shape[axis] > 1


def _size(*axes: str) -> int:
  return math.prod(map(jax.lax.axis_size, axes))


def _varying(x) -> jax.Array:
  """What is typed as reduced, to be computed with; its gradient is summed where it was gathered."""
  return jax.lax.pcast(x, ordered(jax.typeof(x).mat.reduced), to="varying")


def _all_to_all(x, dim: int) -> jax.Array:
  """Block i of a dim to device i of the axis; what comes from device i is block i."""
  for axis in _axis():
    x = jax.lax.all_to_all(x, axis, dim, dim, tiled=True)
  return x


def _ragged_all_to_all(x_RD, rows: int, start_n, send_n, there_n, receive_n) -> jax.Array:
  """Runs of rows to each device: `send` from `start` on, to `there` in its buffer of `rows`."""
  (axis,) = _axis()
  out = jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype)
  out = jax.lax.pcast(out, ordered(jax.typeof(x_RD).mat.varying), to="varying")
  runs = (start_n, send_n, there_n, receive_n)
  form = _emulated if platform() == "cpu" else jax.lax.ragged_all_to_all
  return form(x_RD, out, *(a.astype(jnp.int32) for a in runs), axis_name=axis)


def _emulated(x_RD, out, start_n, send_n, there_n, receive_n, *, axis_name: str) -> jax.Array:
  """The same by a gather of everything: CPU has no ragged exchange."""
  del receive_n
  me, (R, D) = jax.lax.axis_index(axis_name), x_RD.shape
  runs = (jax.lax.all_gather(a, axis_name)[:, me] for a in (start_n, send_n, there_n))
  start_n, send_n, there_n = runs
  at_Rn = jnp.arange(len(out))[:, None] - there_n
  inside_Rn = (at_Rn >= 0) & (at_Rn < send_n)
  source_R = jnp.where(inside_Rn, jnp.arange(len(send_n)) * R + start_n + at_Rn, 0).sum(1)
  rows = jax.lax.all_gather(x_RD, axis_name).reshape(-1, D)
  return jnp.where(inside_Rn.any(1)[:, None], rows[source_R], out)
