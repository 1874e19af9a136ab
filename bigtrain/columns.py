"""Columns: what a run recorded, as arrays by name, for notebooks."""

from typing import Any

import numpy as np

from bigtrain.config import Refused, nearest


class NoColumn(Refused, KeyError):
  """Nothing of that name was recorded."""

  __str__ = Exception.__str__  # A KeyError shows its message in quotes.


class Columns(dict[str, np.ndarray]):
  """Arrays by name, which know what they are called."""

  def __missing__(self, name: str):
    if not self:
      raise NoColumn(f"there is no {name!r}: nothing is recorded yet")
    near = nearest(name, self)
    every = f" Recorded are {', '.join(self)}" if near.endswith("?") else ""
    raise NoColumn(f"there is no {name!r}{near}{every}")


def columns(rows: list[dict[str, Any]]) -> Columns:
  """The rows of metrics.jsonl as arrays, one entry for each row."""
  names = {name for row in rows for name in row} - {"kind"}
  number = lambda value: np.nan if value is None else value  # Not in that row, or not finite.
  return Columns({n: np.array([number(row.get(n)) for row in rows]) for n in sorted(names)})
