"""Pipeline stages: the layers of a stack lie on several devices, and microbatches visit them.

Stages are a dim of arrays. `jax.vmap` applies every stage to the microbatch that it holds, one tick
after the other, and between ticks an island sends all microbatches one stage on. What is inside a
stage is the code that runs without one, islands included: their specs get the stages' dim from
vmap. Gradients are those that jax derives: the same ticks in reverse.

M microbatches go round a ring of M places: S of them are the stages, the others wait in front of
the first stage, spread evenly over all devices. Every microbatch moves one place a tick, and
after M ticks it is where it was. In round r (GPipe has one round) stage s applies its r-th group
of layers, which in depth follows that of stage s - 1, or for s = 0 the last stage's of round r - 1.
So stage s works on item r * M + m, microbatch m in round r, at tick r * M + m + s (Narayanan 2021,
arXiv:2104.04473, section 2.2; Huang 2019, arXiv:1811.06965 for one round).

Dims: N tick, R round, S stage, L layer of a stage in one round, M microbatch, Q microbatches of a
device, B row (of a microbatch), T position, D model.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.hints import to_set

(AXIS,) = sharding.STAGES
INPUT = "input"  # The name that a stage gives to the inputs of its layers, by checkpoint_name.


@config
class Pipeline:
  """How microbatches go through the stages that a mesh has (`Mesh.pipeline`)."""

  # Parts of the rows between two updates, a multiple of the stages; None: as many as divide them,
  # up to 4 for each stage.
  microbatches: int | None = None
  rounds: int = 1  # Groups of layers that each stage has (interleaved stages); 1 is GPipe.
  # What the backward pass finds: all that `remat` keeps of each layer, or the inputs of `stages`
  # alone, where each stage computes its forward pass once more.
  keep: Literal["layers", "stages"] = "layers"

  def check(self) -> None:
    for name in ("microbatches", "rounds"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise Refused(f"pipeline: {name} is {value}; it must be at least 1")

  def schedule(self, stages: int, rows: int) -> "Schedule":
    """That of so many rows of each other shard of the batch, which the stages divide.

    Rows that `microbatches` does not divide, such as those of an evaluation, go in fewer.
    """
    most = self.microbatches or 4 * stages
    fits = lambda m: m % stages == 0 and rows % m == 0
    return Schedule(stages, max(filter(fits, range(stages, max(most, stages) + 1))), self.rounds)

  def check_layers(self, stages: int, repeats: int, rows: int) -> None:
    """Refuses a mesh with `stages` for `repeats` of a pattern and a batch of `rows` a shard."""
    if repeats % (stages * self.rounds):
      rounds = f" times {self.rounds} rounds" if self.rounds > 1 else ""
      fits = [n for n in range(1, stages) if repeats % (n * self.rounds) == 0]
      fewer = f"set {to_set('mesh.pipeline', fits[-1])}" if fits else "mesh.pipeline"
      raise Refused(
        f"the pattern is repeated {repeats} times, which {stages} stages{rounds} do not divide; "
        f"change layers or rounds, or {fewer}"
      )
    if (m := self.microbatches) is None:
      return
    if m % stages:
      near = max(m // stages, 1) * stages
      raise Refused(
        f"{m} microbatches are not a multiple of the {stages} stages, which hold equally many; "
        f"use {near}"
      )
    if rows % m:
      raise Refused(
        f"each shard of the batch has {rows} rows, which {m} microbatches do not divide; change "
        f"batch or pipeline.microbatches"
      )


class Schedule(NamedTuple):
  stages: int
  microbatches: int
  rounds: int

  def ticks(self) -> int:
    """In which at least one stage works."""
    return self.rounds * self.microbatches + self.stages - 1

  def bubble(self) -> float:
    """The share of the time in which a stage has nothing to do."""
    return (self.stages - 1) / self.ticks()

  def table(self) -> np.ndarray:
    """The item r * M + m on which each stage works at each tick, (N, S); -1 for none."""
    item = np.arange(self.ticks())[:, None] - np.arange(self.stages)
    return np.where(self.has(item), item, -1)

  def has(self, item):
    """Whether there is such an item."""
    return (item >= 0) & (item < self.rounds * self.microbatches)


def is_staged(stack) -> bool:
  """Whether the layers of a stack lie on several stages."""
  return any(AXIS in sharding.split_over(w, 1) for w in jax.tree.leaves(stack))


def run(
  stage: Callable,
  c: Pipeline,
  kept: tuple[str, ...] | None,
  stack,
  x_BTD: jax.Array,
  of_rows,
  of_all,
) -> tuple[jax.Array, taps.Found]:
  """All layers of a stack that lies on stages, applied to all rows.

  Args:
    stage: `(layers, x_BTD, of_rows, of_all) -> x_BTD, found` of some layers in turn, and of some
      rows; `found` is what they report, (L, ...) each.
    c: the schedule's settings.
    kept: names of what the backward pass finds of each layer besides its input; None for all.
    stack: arrays with all layers in front, in the order of depth.
    x_BTD: the input of the first layer, its rows also spread over the stages.
    of_rows: a tree of what else there is of each row, (B, ...).
    of_all: a tree of what is the same for all rows and layers.

  Returns:
    The output of the last layer, like `x_BTD`, and what layers report, with all layers in front,
    merged over microbatches by `taps.joined`.
  """
  stages = jax.sharding.get_abstract_mesh().shape[AXIS]
  plan = c.schedule(stages, len(x_BTD) * stages // sharding.axis_size("B"))
  # Modules and other trees stay outside: what follows deals with lists of arrays.
  layers, stack_tree = jax.tree.flatten(stack)
  ids_B = jnp.arange(len(x_BTD), out_sharding=sharding.act("B"))
  rows, rows_tree = jax.tree.flatten((x_BTD, ids_B, of_rows))
  layers, rows = [_dealt(plan, w) for w in layers], [_split(plan, a) for a in rows]

  def of_lists(layers, rows, of_all):
    x_BTD, ids_B, of_rows = jax.tree.unflatten(rows_tree, rows)
    with sharding.stage(ids_B):
      y_BTD, found = stage(jax.tree.unflatten(stack_tree, layers), x_BTD, of_rows, of_all)
    return y_BTD, (found, ids_B)

  policy = jax.checkpoint_policies.everything_saveable
  if kept is not None:
    names = (INPUT, *kept) if c.keep == "layers" else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
  x_SQBTD, (found, ids_MRSB) = _ticks(of_lists, plan, policy, layers, rows, of_all)
  found, ids_MRSB = jax.sharding.reshard((found, ids_MRSB), P())
  found = taps.joined(found, ids_MRSB[:, 0, 0])
  found = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), found)
  return _joined(x_SQBTD, jax.typeof(x_BTD).sharding.spec), found


def _split(plan: Schedule, a_B) -> jax.Array:
  """Rows as (S, Q, B, ...), every device keeping the rows it has."""
  first, *inner = jax.typeof(a_B).sharding.spec  # `pipeline`, and what else splits the batch.
  rest = () if first == AXIS else first[1:]
  Q = plan.microbatches // plan.stages
  shape = (plan.stages, len(a_B) // plan.microbatches, Q, *a_B.shape[1:])
  spec = P(AXIS, rest or None, None, *inner)
  return jnp.swapaxes(jax.lax.reshape(a_B, shape, out_sharding=spec), 1, 2)


def _joined(a_SQB, spec: P) -> jax.Array:
  S, Q, B, *inner = a_SQB.shape
  return jax.lax.reshape(jnp.swapaxes(a_SQB, 1, 2), (S * Q * B, *inner), out_sharding=spec)


def _dealt(plan: Schedule, w) -> jax.Array:
  """What a stack has of each layer, as (R, S, L, ...): group r * S + s of layers on stage s.

  As it is stored, a stack has neighbouring layers on a stage. With several rounds each group is
  moved to where it is used: once a step, and its gradient back.
  """
  (first, *inner), (S, _, R) = jax.typeof(w).sharding.spec, plan
  groups = lambda *n: (*n, len(w) // (R * S), *w.shape[1:])
  if first is None:  # The same on every device, such as keys.
    return jax.sharding.reshard(jnp.reshape(w, groups(R, S)), P(None, AXIS))
  w_SRL = jax.lax.reshape(w, groups(S, R), out_sharding=P(AXIS, None, None, *inner))
  if R == 1:
    return jnp.swapaxes(w_SRL, 0, 1)
  deal, spec = functools.partial(_deal, S, R), P(None, AXIS, None, *inner)
  return jax.shard_map(deal, in_specs=jax.typeof(w_SRL).sharding.spec, out_specs=spec)(w_SRL)


def _deal(S: int, R: int, w_SRL) -> jax.Array:
  """The island that moves groups: R permutations, in each of which every stage sends one."""
  d, me = math.gcd(S, R), jax.lax.axis_index(AXIS)
  of_place_RS = np.zeros((R, S), int)  # Which permutation brings what a stage has in a round.
  came = []
  for k in range(R):
    # Stage a has the groups a * R + b. With this choice of b no two go to one stage.
    b_S = np.array([k // d * d + (k + a // (S // d)) % d for a in range(S)])
    group_S = np.arange(S) * R + b_S
    of_place_RS[group_S // S, group_S % S] = k
    sent_L = jax.lax.dynamic_index_in_dim(w_SRL[0], jnp.asarray(b_S)[me], keepdims=False)
    came.append(jax.lax.ppermute(sent_L, AXIS, [(a, int(g) % S) for a, g in enumerate(group_S)]))
  came_RL = jnp.stack(came)
  pick = lambda of_S: jax.lax.dynamic_index_in_dim(came_RL, jnp.asarray(of_S)[me])
  return jnp.stack([pick(of_S) for of_S in of_place_RS])


def _ticks(stage: Callable, plan: Schedule, policy, layers, rows, of_all) -> tuple[Any, Any]:
  """Every tick in turn. Returns the rows' activations (S, Q, B, T, D) and reports (M, R, S, L)."""
  stages_S = jnp.arange(plan.stages, out_sharding=P(AXIS))

  def work(layers, here, of_all, n):
    def one(s, layers, here):
      y_BTD, found = stage(layers, here, of_all)
      return jnp.where(plan.has(n - s), y_BTD, here[0]), found

    return jax.vmap(one)(stages_S, _of_round(plan, layers, n), here)

  # Also so that no tick keeps the weights that it picked: they are there anyway.
  work = jax.checkpoint(work, policy=policy, prevent_cse=False)

  def tick(ring, n):
    x_SBTD, found = work(layers, [a[:, 0] for a in ring], of_all, n)
    done = jax.lax.dynamic_update_index_in_dim(ring[0], x_SBTD, 0, 1)
    return _moved(plan, 1, [done, *ring[1:]], n), found

  ring, found = jax.lax.scan(tick, rows, jnp.arange(plan.ticks()))
  # Behind the last tick microbatches are S - 1 places from where they were at first.
  undo = lambda ring, n: (_moved(plan, -1, ring, n), None)
  left = plan.ticks() - 1 - jnp.arange(plan.stages - 1)
  (x_SQBTD,), _ = jax.lax.scan(undo, ring[:1], left)
  if (waiting := x_SQBTD.shape[1] - 1) > 1:
    # That of position p at tick n is in the slot (p + n) % waiting: see `_moved`.
    turned = jnp.roll(x_SQBTD[:, 1:], -(plan.rounds * plan.microbatches % waiting), axis=1)
    x_SQBTD = jnp.concatenate([x_SQBTD[:, :1], turned], axis=1)
  return x_SQBTD, _reports(plan, found)


def _of_round(plan: Schedule, layers: list, n) -> list:
  """The layers (S, L, ...) that each stage applies at tick n."""

  def local(layers, n):
    r = (n - jax.lax.axis_index(AXIS)) // plan.microbatches
    r = jnp.clip(r, 0, plan.rounds - 1)
    return [jax.lax.dynamic_index_in_dim(w, r, keepdims=False) for w in layers]

  specs = [jax.typeof(w).sharding.spec for w in layers]
  out_specs = [P(*spec[1:]) for spec in specs]
  return jax.shard_map(local, in_specs=(specs, P()), out_specs=out_specs)(layers, n)


def _moved(plan: Schedule, step: int, ring: list, n) -> list:
  """Microbatches (S, Q, B, ...) one place further behind tick n, or with step -1 back again.

  The first of the Q of a device is at its stage, the others wait. Of these, one moves at a tick:
  that of the first stage's device to the stage, that of any other to the device before; the last
  device gets what the last stage has done. With Q = 1 that goes to the first stage itself.
  """
  S, Q = ring[0].shape[:2]
  first, last = (0, S - 1)[::step]

  def shift(a, step):
    return jax.lax.ppermute(a, AXIS, [(s, (s + step) % S) for s in range(S)])

  def local(ring, n):
    if Q == 1:
      return [shift(a_SQ, step) for a_SQ in ring]
    slot, me = 1 + n % (Q - 1), jax.lax.axis_index(AXIS)
    moved = []
    for a_SQ in ring:
      here, waits = a_SQ[:, 0], jax.lax.dynamic_index_in_dim(a_SQ, slot, 1, keepdims=False)
      a_SQ = a_SQ.at[:, 0].set(jnp.where(me == first, waits, shift(here, step)))
      waits = jnp.where(me == last, here, shift(waits, -step))
      moved.append(jax.lax.dynamic_update_index_in_dim(a_SQ, waits, slot, 1))
    return moved

  specs = [jax.typeof(a).sharding.spec for a in ring]
  return jax.shard_map(local, in_specs=(specs, P()), out_specs=specs)(ring, n)


def _reports(plan: Schedule, found):
  """Of what stages reported at all ticks (N, S, L, ...) that of real items, (M, R, S, L, ...)."""

  def local(leaves):
    _, M, R = plan
    start = jax.lax.axis_index(AXIS)
    of_items = [jax.lax.dynamic_slice_in_dim(a_NSL, start, R * M) for a_NSL in leaves]
    return [jnp.swapaxes(a.reshape(R, M, *a.shape[1:]), 0, 1) for a in of_items]

  leaves, tree = jax.tree.flatten(found)
  if not leaves:
    return found
  specs = [P(None, AXIS, *jax.typeof(a).sharding.spec[2:]) for a in leaves]
  leaves = jax.sharding.reshard(leaves, specs)  # What is the same for all stages lies on none.
  out_specs = [P(None, *spec) for spec in specs]
  found = jax.shard_map(local, in_specs=(specs,), out_specs=out_specs)(leaves)
  return jax.tree.unflatten(tree, found)


def layer_scan(body: Callable, x, stack, rest, unroll: int = 1):
  """As `jax.lax.scan` over (stack, *rest), also where the layers of the stack lie on stages.

  Nothing is pipelined: each layer's weights come to all devices when they are used.
  """
  if not is_staged(stack):
    return jax.lax.scan(lambda x, layer: body(x, layer), x, (stack, *rest), unroll=unroll)

  def of_index(x, layer):
    i, *rest = layer
    return body(x, (jax.tree.map(lambda w: _broadcast(w, i), stack), *rest))

  return jax.lax.scan(
    of_index, x, (jnp.arange(len(jax.tree.leaves(stack)[0])), *rest), unroll=unroll
  )


def _broadcast(w_L, i) -> jax.Array:
  """Layer i of a stack on stages, on all devices."""
  spec = jax.typeof(w_L).sharding.spec

  def local(w_L, i):
    mine = jax.lax.dynamic_index_in_dim(w_L, i % len(w_L), keepdims=False)
    is_here = jax.lax.axis_index(AXIS) == i // len(w_L)
    return jax.lax.psum(jnp.where(is_here, mine, 0), AXIS)

  return jax.shard_map(local, in_specs=(spec, P()), out_specs=P(*spec[1:]))(w_L, i)
