"""Random order without state: hashes and permutations that are pure functions of their key.

Nothing here keeps a generator, so any example of any epoch is reached in constant time from any
thread, and the order never changes with the version of a library: it is integer arithmetic only.
"""

import functools
from collections.abc import Callable

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / the golden ratio: the increment of splitmix64.
ROUNDS = 6  # Four make a Feistel network pseudorandom (Luby and Rackoff 1988); two are margin.


def hashes(key, x) -> np.ndarray:
  """64 well-mixed bits for every element of `x`, by splitmix64 (Steele et al. 2014).

  Args:
    key: uint64 scalar or array that broadcasts against `x`.
    x: integers.
  """
  x = np.atleast_1d(np.asarray(x)).astype(np.uint64)
  z = (x + np.uint64(1)) * np.uint64(GOLDEN) + np.atleast_1d(np.asarray(key, np.uint64))
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def key_of(*numbers: int) -> np.ndarray:
  """One key, (1,) uint64, from a path of integers such as (seed, epoch, window)."""
  key = np.zeros(1, np.uint64)
  for number in numbers:
    key = hashes(key, number % 2**64)
  return key


def in_blocks(
  order: Callable[[int], np.ndarray], size: int, kept: int
) -> Callable[[np.ndarray], np.ndarray]:
  """Looks single examples up in an order that is computed a block at a time.

  Most of such a computation is the calls: what is computed for a block serves the batches around.

  Args:
    order: gives two integers for each example of a block, (2, size), by the block's number.
    size: examples of a block.
    kept: blocks that are remembered.

  Returns:
    A function of the numbers of examples, (n,), to (2, n) int64.
  """
  order_of = functools.lru_cache(kept)(order)

  def look_up(examples: np.ndarray) -> np.ndarray:
    blocks, within = np.divmod(examples, size)
    found = np.empty((2, len(examples)), np.int64)
    for block in set(blocks.tolist()):
      here = blocks == block
      found[:, here] = order_of(block)[:, within[here]]
    return found

  return look_up


def permute(x, n, key) -> np.ndarray:
  """Where a keyed permutation of range(n) sends each `x`: a bijection, in constant memory.

  A Feistel network on pairs of digits in base ceil(sqrt(n)); what falls outside n is sent through
  it again (cycle walking, Black and Rogaway 2002), which happens for at most 2 in sqrt(n).

  Args:
    x: integers in [0, n).
    n: the size, scalar or one for every x; below 2**52.
    key: uint64 scalar, or one for every x.
  """
  x, n, key = np.broadcast_arrays(
    np.atleast_1d(np.asarray(x, np.uint64)), np.asarray(n, np.uint64), np.asarray(key, np.uint64)
  )
  side = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
  out = _feistel(x, side, key)
  while len(outside := np.flatnonzero(out >= n)):
    out[outside] = _feistel(out[outside], side[outside], key[outside])
  return out.astype(np.int64)


def _feistel(x, side, key) -> np.ndarray:
  left, right = np.divmod(x, side)
  for turn in range(ROUNDS):
    left, right = right, (left + hashes(key + np.uint64(turn), right)) % side
  return left * side + right
