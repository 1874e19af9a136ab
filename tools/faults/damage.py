"""Damage to files, by a seeded generator."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def pick(items: Sequence[T], rng: random.Random) -> T:
  if not items:
    raise RuntimeError("there is nothing to damage")
  return rng.choice(items)


def flip(path: Path, rng: random.Random) -> int:
  """Flips one bit; returns which."""
  data = bytearray(path.read_bytes())
  at = rng.randrange(8 * len(data))
  data[at // 8] ^= 1 << at % 8
  path.write_bytes(data)
  return at


def truncate(path: Path, rng: random.Random) -> int:
  """Leaves a part of it, also none; returns how many bytes."""
  data = path.read_bytes()
  left = rng.randrange(len(data))
  path.write_bytes(data[:left])
  return left
