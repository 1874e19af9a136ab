"""Taps: what layers report of themselves, collected while a step that asks for it is traced.

A layer calls `tap` where a statistic is at hand; nothing is computed unless someone collects. What
is tapped in a function that jax traces by itself, such as the body of a scan or a rematerialised
block, is a value of that trace and has to be one of its results: `collected` makes it one, and
`hand_on` taps it again outside.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Found = dict[str, jax.Array]  # "statistic/path.of.layer" -> value; (repeats,) for stacked layers.

_found: contextvars.ContextVar[Found | None] = contextvars.ContextVar("found", default=None)
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("path", default=())


def tap(name: str, statistic: Callable[..., jax.Array], *args) -> None:
  """Reports `statistic(*args)` of the layer at hand, where someone collects.

  Microbatches average it, or, where the name ends in "max", take the largest. Of a mask, bool
  (units,), what is reported is the share of the units for which it holds in every microbatch.
  """
  if (found := _found.get()) is not None:
    found[f"{name}/{'.'.join(_path.get())}"] = statistic(*args)


@contextlib.contextmanager
def named(*path: object) -> Iterator[None]:
  """What is tapped in here is of a layer that lies under that path."""
  token = _path.set((*_path.get(), *map(str, path)))
  try:
    yield
  finally:
    _path.reset(token)


def collect(function: Callable) -> Callable[..., tuple[Any, Found]]:
  """`function`, with what is tapped in it as a second result."""

  def call(*args, **kwargs):
    found: Found = {}
    found_token, path_token = _found.set(found), _path.set(())
    try:
      return function(*args, **kwargs), found
    finally:
      _found.reset(found_token)
      _path.reset(path_token)

  return call


def collected(function: Callable) -> Callable[..., tuple[Any, Found]]:
  """`collect` if someone does so already; else `function` with nothing found."""
  return collect(function) if _found.get() is not None else lambda *a, **k: (function(*a, **k), {})


def under(path: object, found: Found) -> Found:
  """What was found, as of layers that lie under `path`."""
  split = (name.partition("/") for name in found)
  return {
    f"{statistic}/{'.'.join(filter(None, [str(path), inner]))}": found[f"{statistic}/{inner}"]
    for statistic, _, inner in split
  }


def hand_on(inner: Found) -> None:
  """Taps here, under the path at hand, what `collected` found inside."""
  if (found := _found.get()) is not None:
    found |= under(".".join(_path.get()), inner)


def _either(name: str, largest, mean):
  return largest if name.partition("/")[0].endswith("max") else mean


def over_microbatches(found: Found) -> Found:
  """One value for each statistic, from those of all microbatches, stacked in front."""
  reduce = lambda name, value: jnp.all if value.dtype == bool else _either(name, jnp.max, jnp.mean)
  return {name: reduce(name, value)(value, axis=0) for name, value in found.items()}


def shares(found: Found) -> Found:
  """The same with a share of units in the place of each mask."""
  share = lambda x: jnp.mean(x.astype(jnp.float32), axis=-1) if x.dtype == bool else x
  return {name: share(value) for name, value in found.items()}


def over_devices(found: Found) -> Found:
  """One value for each statistic, from those of all devices, inside an island."""

  def reduce(name: str, value: jax.Array) -> jax.Array:
    axes = (*jax.typeof(value).mat.varying,)
    if value.dtype == bool:
      return jax.lax.pmin(value.astype(jnp.int32), axes).astype(bool)
    return _either(name, jax.lax.pmax, jax.lax.pmean)(value, axes)

  return {name: reduce(name, value) for name, value in found.items()}


def rms(x: jax.Array) -> jax.Array:
  """The root of the mean square of all elements, in float32."""
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
