"""Malformed inputs, made of whole ones by a seeded generator: bytes, and values within JSON."""

import json
import random
from typing import Any

BYTES = (b"\0", b"\n", b"\xff\xfe", b'"', b"{", b"}", b"[", b"\xed\xa0\x80", b"\x80" * 9, b"NaN")
VALUES: tuple[Any, ...] = (
  None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, -0.5, float("nan"),
  float("inf"), "", "x", "\ud800", "../../x", "/etc/passwd", "os:system", "builtins:eval",
  "subprocess:Popen", "bigtrain.config:Refused", "x" * 5000, [], {}, [[]], [None], {"class": "x"},
  {"": 0}, {"class": "os:system", "command": "false"}, [0] * 1000,
)  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
  """One to four changes: of single bits, of stretches, of the length."""
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    at = rng.randrange(len(out) + 1)
    match rng.randrange(7):
      case 0 if at < len(out):
        out[at] ^= 1 << rng.randrange(8)
      case 1 if at < len(out):
        out[at] = rng.randrange(256)
      case 2:
        del out[at:]
      case 3:
        del out[at : at + rng.randrange(1, 64)]
      case 4:
        out[at:at] = rng.choice(BYTES) * rng.choice((1, 1, 8, 400))
      case 5:
        end = at + rng.randrange(1, 64)
        out[at:at] = out[at:end]
      case 6:
        out[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
  return bytes(out)


def misshapen(tree: Any, rng: random.Random) -> Any:
  """A copy of some JSON in which one value is another, or one field more or fewer."""
  tree = json.loads(json.dumps(tree))
  places = [*_places(tree)]
  if not places or rng.random() < 0.02:
    return rng.choice(VALUES)
  within, key = rng.choice(places)
  match rng.randrange(5):
    case 0 if isinstance(within, dict):
      del within[key]
    case 1 if isinstance(within, dict):
      within[rng.choice(("unknown", "", "class", "__class__", str(key) + "s"))] = rng.choice(VALUES)
    case 2:
      other, name = rng.choice(places)
      if name in other if isinstance(other, dict) else name < len(other):
        within[key] = json.loads(json.dumps(other[name]))
    case _:
      within[key] = rng.choice(VALUES)
  return tree


def _places(tree: Any):
  items = (
    tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  )
  for key, value in items:
    yield tree, key
    yield from _places(value)


def json_text(data: bytes, rng: random.Random) -> bytes:
  """JSON, or lines of it, misshapen; sometimes its bytes are damaged instead."""
  if rng.random() < 0.3:
    return damaged(data, rng)
  if rng.random() < 0.02:
    return b"[" * 100_000
  lines = data.split(b"\n")
  try:
    json.loads(data)
    lines = [data]
  except ValueError:
    lines = lines[:-1]
  at = rng.randrange(len(lines))
  lines[at] = json.dumps(misshapen(json.loads(lines[at]), rng)).encode()
  return b"\n".join(lines) + b"\n"
