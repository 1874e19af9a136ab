"""Taps: what layers report of themselves, collected while a step that asks for it is traced.

A layer calls `tap` where a statistic is at hand; nothing is computed unless someone collects. There
are two kinds: statistics are for people, and collected now and then; sums over the batch, whose
names begin with `SUM`, decide what a step computes (objectives/experts.py), and are always
collected in training. What is tapped in a function that jax traces by itself, such as the body of a
scan or a rematerialised block, is a value of that trace and has to be one of its results:
`collected` makes it one, and `hand_on` taps it again outside.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bigtrain import sharding
from bigtrain.mesh import ordered

Found = dict[str, Any]  # "name/path.of.layer" -> array or Mean; (repeats, ...) for stacked layers.
SUM = "sum:"
OF_ROWS = "sum:row:"  # Of these each row has a value.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  """A statistic that is `sum / weight`, or the root of that: those of parts of a batch add up."""

  sum: jax.Array
  weight: jax.Array
  root: bool = dataclasses.field(default=False, metadata={"static": True})

  def value(self) -> jax.Array:
    mean = self.sum / jnp.maximum(self.weight, 1)
    return jnp.sqrt(mean) if self.root else mean


_found: contextvars.ContextVar[Found] = contextvars.ContextVar("found")
_kinds: contextvars.ContextVar[frozenset[bool]] = contextvars.ContextVar(
  "kinds", default=frozenset()
)
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("path", default=())


def tap(name: str, statistic: Callable[..., jax.Array | Mean], *args) -> None:
  """Reports `statistic(*args)` of the layer at hand, where someone collects its kind.

  Microbatches average a statistic, a `Mean` by its weights, or, where the name ends in "max", take
  the largest. Of a mask, bool (units,), what is reported is the share of the units for which it
  holds in every microbatch.
  A sum is one over all tokens, or, where the name begins with `OF_ROWS`, has a value for each row.
  """
  if _is_sum(name) in _kinds.get():
    _found.get()[f"{name}/{'.'.join(_path.get())}"] = statistic(*args)


@contextlib.contextmanager
def named(*path: object) -> Iterator[None]:
  """What is tapped in here is of a layer that lies under that path."""
  token = _path.set((*_path.get(), *map(str, path)))
  try:
    yield
  finally:
    _path.reset(token)


def collect(function: Callable, *, sums: bool = False) -> Callable[..., tuple[Any, Found]]:
  """`function`, with the statistics or the sums that are tapped in it as a second result."""

  def call(*args, **kwargs):
    with _collecting(_kinds.get() | {sums}) as found:
      result = function(*args, **kwargs)
    own = {name: found.pop(name) for name in list(found) if _is_sum(name) == sums}
    hand_on(found)
    return result, own

  return call


def collected(function: Callable) -> Callable[..., tuple[Any, Found]]:
  """`function`, with what is tapped in it of the kinds that someone collects already."""

  def call(*args, **kwargs):
    with _collecting(_kinds.get()) as found:
      return function(*args, **kwargs), found

  return call


@contextlib.contextmanager
def _collecting(kinds: frozenset[bool]) -> Iterator[Found]:
  found: Found = {}
  of_found, of_kinds, of_path = _found.set(found), _kinds.set(kinds), _path.set(())
  try:
    yield found
  finally:
    _found.reset(of_found)
    _kinds.reset(of_kinds)
    _path.reset(of_path)


def _is_sum(name: str) -> bool:
  return name.startswith(SUM)


def under(path: object, found: Found) -> Found:
  """What was found, as of layers that lie under `path`."""
  split = (name.partition("/") for name in found)
  return {
    f"{statistic}/{'.'.join(filter(None, [str(path), inner]))}": found[f"{statistic}/{inner}"]
    for statistic, _, inner in split
  }


def hand_on(inner: Found) -> None:
  """Taps here, under the path at hand, what `collected` found inside."""
  if inner:
    _found.get().update(under(".".join(_path.get()), inner))


def _either(name: str, largest, mean):
  return largest if name.partition("/")[0].endswith("max") else mean


def over_microbatches(found: Found) -> Found:
  """One value for each statistic, from those of all microbatches, stacked in front."""

  def reduce(name: str, value) -> Any:
    if isinstance(value, Mean):
      return jax.tree.map(lambda x: x.sum(0), value)
    return (jnp.all if value.dtype == bool else _either(name, jnp.max, jnp.mean))(value, axis=0)

  return {name: reduce(name, value) for name, value in found.items()}


def joined(found: Found, ids_MB: jax.Array) -> Found:
  """As `over_microbatches` of statistics; sums are those over all rows, or of all rows in order.

  Args:
    found: of all microbatches, stacked in front; replicated.
    ids_MB: which rows of the batch these have.
  """
  order = jnp.argsort(ids_MB.reshape(-1))

  def of_rows(x_MB):
    x_BM = jnp.moveaxis(x_MB, 0, -2)
    return x_BM.reshape(*x_BM.shape[:-2], -1)[..., order]

  sums = {name: value for name, value in found.items() if _is_sum(name)}
  statistics = {name: value for name, value in found.items() if not _is_sum(name)}
  join = lambda name, x: of_rows(x) if name.startswith(OF_ROWS) else x.sum(0)
  return over_microbatches(statistics) | {name: join(name, x) for name, x in sums.items()}


def values(found: Found) -> Found:
  """The same with a number in the place of each mask, its share of units, and of each mean."""

  def number(x) -> jax.Array:
    if isinstance(x, Mean):
      return x.value()
    return jnp.mean(x.astype(jnp.float32), axis=-1) if x.dtype == bool else x

  return {name: number(x) for name, x in found.items()}


def over_devices(found: Found) -> Found:
  """One value for each statistic, from those of all devices, inside an island."""

  def reduce(name: str, value) -> Any:
    leaves = jax.tree.leaves(value)
    varying = frozenset().union(*(jax.typeof(x).mat.varying for x in leaves))
    axes, value = sharding.within(ordered(varying)), jax.lax.stop_gradient(value)
    if isinstance(value, Mean):  # Along an axis on which weights are the same they count each time.
      new = lambda x: ordered(varying - jax.typeof(x).mat.varying)
      wide = lambda x: jax.lax.pcast(x, new(x), to="varying")
      return jax.tree.map(lambda x: jax.lax.psum(wide(x), axes), value)
    if value.dtype == bool:
      return jax.lax.pmin(value.astype(jnp.int32), axes).astype(bool)
    return _either(name, jax.lax.pmax, jax.lax.pmean)(value, axes)

  return {name: reduce(name, value) for name, value in found.items()}


def rms(x: jax.Array) -> Mean:
  """The root of the mean square of all elements, in float32."""
  return Mean(jnp.square(x.astype(jnp.float32)).sum(), jnp.float32(x.size), root=True)
