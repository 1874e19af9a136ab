"""Digests of arrays: one number for each chunk of rows, the same bits on any mesh and in numpy.

A word's hash depends on its value and on its place in the whole array, and a digest is the sum of
hashes modulo 2^32: it does not matter which device adds up what, so what was written from one mesh
is checked on another. Any one wrong word changes the sum; of several, one in 2^32 goes unseen. They
guard against faults, not against forgery.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import sharding

CHUNKS = 16  # Of an array, along its first dim.
BLOCK = 2**22  # Elements.
LITTLE = 2**24  # Bytes.
# The finalizer of MurmurHash3 (Appleby): it maps no two words to one.
M1, M2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


def mixed(x):
  """A bijection of uint32 words that spreads every bit over all of them; jax or numpy."""
  x = (x ^ (x >> np.uint32(16))) * M1
  x = (x ^ (x >> np.uint32(13))) * M2
  return x ^ (x >> np.uint32(16))


def chunks(shape: tuple[int, ...]) -> int:
  """How many digests an array has."""
  return math.ceil(_rows(shape) / _per_chunk(shape))


def _rows(shape: tuple[int, ...]) -> int:
  return shape[0] if shape else 1


def _per_chunk(shape: tuple[int, ...]) -> int:
  """How many rows a chunk has; the last may have fewer."""
  return max(math.ceil(_rows(shape) / CHUNKS), 1)


def of_array(x: jax.Array) -> jax.Array:
  """(chunks,) uint32 of a traced array, wherever its parts lie; replicated."""
  hashes = _hashes(jax.device_put(x, jax.memory.Space.Device))  # It may wait in the host's memory.
  rows = jnp.sum(hashes, axis=range(1, hashes.ndim), dtype=jnp.uint32)
  rows = rows if sharding.act("") is None else jax.sharding.reshard(rows, jax.P(None))
  per = _per_chunk(x.shape)
  padded = jnp.pad(rows, (0, -len(rows) % per))
  return jnp.sum(padded.reshape(-1, per), axis=1, dtype=jnp.uint32)


def of_part(x: jax.Array) -> jax.Array:
  """uint32 of what one device has of an array, in an island."""
  return jnp.sum(_hashes(x), dtype=jnp.uint32)


@jax.jit  # Once for the arrays of a state, however often it is saved.
def _of_each(arrays: list[jax.Array]) -> list[jax.Array]:
  return [of_array(x) for x in arrays]


def of_batch(batch: Mapping[str, jax.Array]) -> jax.Array:
  """uint32 of a traced global batch: of what is in its arrays, in the order of their names."""
  total = jnp.uint32(0)
  for name in sorted(batch):
    total = followed(total, jnp.sum(_hashes(batch[name]), dtype=jnp.uint32))
  return total


def followed(so_far, by):
  """The digest of a sequence, one longer than that of which `so_far` is."""
  return mixed(so_far + by + np.uint32(1))


def _hashes(x: jax.Array) -> jax.Array:
  """uint32 of each word."""
  words = _words(x.reshape(1) if x.ndim == 0 else x)
  place = None if sharding.act("") is None else jax.typeof(words).sharding
  at = jnp.uint32(0)
  for dim, stride in enumerate(_strides(words.shape)):
    at += stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim, out_sharding=place)
  return mixed(words ^ mixed(at))


def of_block(x: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...]) -> np.ndarray:
  """(chunks,) uint32: what a block adds to the digests of its array, on the host.

  The blocks of an array, however it is cut, add up to what `of_array` gives (modulo 2^32).

  Args:
    x: the block.
    shape: of the whole array.
    start: the place in it of the block's first element.
  """
  if x.size > BLOCK:  # What is computed on the way takes several times its size.
    dim = next(dim for dim, n in enumerate(x.shape) if n > 1)
    half = x.shape[dim] // 2
    first, second = np.split(x, [half], axis=dim)
    then = tuple(at + half * (i == dim) for i, at in enumerate(start))
    return of_block(first, shape, start) + of_block(second, shape, then)
  sums = np.zeros(chunks(shape), np.uint32)
  words = _words(x if shape else x.reshape(1))
  shape, start = shape or (1,), start or (0,)
  at = np.zeros((), np.uint32)
  for dim, stride in enumerate(_strides((*shape, *words.shape[len(shape) :]))):
    first = start[dim] if dim < len(start) else 0
    along = (np.arange(words.shape[dim]) + first).astype(np.uint32) * stride
    at = at[..., None] + along
  rows = mixed(words ^ mixed(at)).reshape(len(words), -1).sum(axis=1, dtype=np.uint32)
  np.add.at(sums, (np.arange(len(rows)) + start[0]) // _per_chunk(shape), rows)
  return sums


def of_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, list[int]]:
  """The digests of arrays, by name; all processes that hold parts of them take part.

  Little is quicker computed on the host than its program is compiled.
  """
  little = sum(x.nbytes for x in arrays.values()) < LITTLE
  if little and all(getattr(x, "is_fully_addressable", True) for x in arrays.values()):
    on_host = {name: np.asarray(x) for name, x in arrays.items()}
    return {name: of_block(x, x.shape, (0,) * x.ndim).tolist() for name, x in on_host.items()}
  found = jax.device_get(_of_each(list(arrays.values())))
  return {name: sums.tolist() for name, sums in zip(arrays, found, strict=True)}


def _strides(shape: tuple[int, ...]) -> list[Any]:
  """How many words lie between neighbours, modulo 2^32."""
  return [np.uint32(math.prod(shape[dim + 1 :]) % 2**32) for dim in range(len(shape))]


def _words(x):
  """The bits as uint32; numbers of eight bytes have one more dim, of two."""
  numpy = isinstance(x, np.ndarray)
  if x.dtype == bool:
    x = x.astype(np.uint8)
  unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
  if not numpy:
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  bits = np.ascontiguousarray(x).view(unsigned)
  return (bits.reshape(*x.shape, 2) if x.dtype.itemsize == 8 else bits).astype(np.uint32)
