"""What differs between a mesh and one device, by name, and where it begins.

A difference is the norm of a tensor's difference over the norm of what one device has; of the steps
the worst one counts. Both sides round: each sum of n numbers in float32 (2^-24 at a time) is off by
some 1e-7, and by more where what is summed cancels or an optimizer inverts it. How much more is
measured, not guessed: one device makes each step once more from numbers that differ in their last
bit, and what that moves is the tensor's own rounding. A tensor may differ by `LEAST`, or by `TIMES`
its rounding where that is more. The least fault there is, of one shard in n, is 1 / n.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from bigtrain.console import tables
from bigtrain.leaves import flatten
from bigtrain.statistics import unstacked

LEAST = 1e-5
TIMES = 10
BLIND = 1e-2  # A tensor whose rounding allows more than this shows no small fault.
# In the order of a step: what layers say of their outputs, the sums of the loss and of metrics,
# what becomes of parameters and variables.
KINDS = ("output", "loss", "gradient", "variables", "update", "optimizer")


@dataclasses.dataclass
class Tensor:
  """How far a tensor differs, in the worst of the steps."""

  kind: str  # One of KINDS.
  name: str
  norm: float = 0.0  # On one device, in that step.
  difference: float = -1.0  # Relative to it.
  rounding: float = 0.0  # Relative to it: what a last bit moves, in the worst of the steps.
  step: int = 0  # That step, from 1.
  seen: int = 0  # Steps.

  @property
  def allowed(self) -> float:
    return max(LEAST, TIMES * self.rounding)

  @property
  def equal(self) -> bool:
    return self.difference <= self.allowed  # Also false of what is not a number.

  def see(self, got, wanted, moved) -> None:
    """Takes the values of one more step: of the mesh, of one device, of that after a nudge."""
    self.seen += 1
    norm = _norm(wanted)
    difference = _norm(np.subtract(got, wanted, dtype=np.float64)) / max(norm, 1e-30)
    self.rounding = max(
      self.rounding, _norm(np.subtract(moved, wanted, dtype=np.float64)) / max(norm, 1e-30)
    )
    if not (difference <= self.difference or np.isnan(self.difference)):  # NaN is the worst.
      self.norm, self.difference, self.step = norm, difference, self.seen


def _norm(x) -> float:
  return float(np.linalg.norm(np.asarray(x, np.float64)))


def named(kind: str, tree: Any) -> dict[str, Any]:
  """Arrays by name; of what is shaped like parameters, each layer of a stack by itself."""
  if kind == "output":
    return unstacked(tree)
  if kind in ("gradient", "update"):
    return by_layer(flatten(tree))
  return tree if kind == "loss" else flatten(tree)


def by_layer(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters by path, each layer of a stack by itself, in the order they are given."""
  return {
    k.removeprefix("/"): x for k, x in unstacked({f"/{k}": x for k, x in flat.items()}).items()
  }


class Report:
  """All tensors of all steps."""

  def __init__(self, axes: dict[str, int], tensors: list[Tensor], order: Callable[[], list[str]]):
    """Of the `axes` of a mesh that span several devices.

    `order` gives the names of the parameters in the order of the forward pass; it is called where
    something differs.
    """
    self.axes, self.tensors = axes, tensors
    self.steps = max((t.seen for t in tensors), default=0)
    self._order = functools.cache(order)

  @property
  def equal(self) -> bool:
    return all(tensor.equal for tensor in self.tensors)

  def different(self, *kinds: str) -> list[Tensor]:
    """Those that differ, of these kinds or of all."""
    return [t for t in self.tensors if not t.equal and t.kind in (kinds or KINDS)]

  def first(self) -> tuple[str, Tensor] | None:
    """Where both begin to differ, in words and as the tensor that shows it; None if they do not.

    Layers come in the order of the forward pass. Where that is equal, a fault of the backward pass
    shows in what lies between it and the inputs: the deepest layer is the first.
    """
    kind = next((kind for kind in KINDS if self.different(kind)), None)
    if kind is None:
      return None
    found = self.different(kind)
    if kind == "output":
      nearest = min(map(self._depth, found))
      found = [t for t in found if self._depth(t) == nearest]
    worst = max(found, key=_excess)
    statistic, _, layer = worst.name.rpartition("/")
    if kind == "output":
      return f"in the forward pass {layer} is the first layer that differs: its {statistic}", worst
    if kind == "loss":
      reported = max((self._depth(t) for t in self.tensors if t.kind == "output"), default=-1)
      behind = [t for t in self.different("gradient") if self._depth(t) > reported]
      if not behind:
        return f"all layers give the same, and then {worst.name} differs", worst
      first = min(behind, key=self._depth)
      where = "among" if reported < 0 else "behind equal layers, among"
      said = f"the loss differs; {where} gradients in the order of the forward pass the first is"
      return f"{said} that of {first.name}", first
    if kind == "gradient":
      first = max(found, key=self._depth)
      said = "the forward pass is equal; in the backward pass the first gradient that differs is"
      return f"{said} that of {first.name}", first
    if kind == "variables":
      return f"gradients are equal; of the variables behind the step {worst.name} differs", worst
    return f"gradients are equal; of what the optimizer makes of them {worst.name} differs", worst

  def _depth(self, tensor: Tensor) -> int:
    """When the forward pass is through with a tensor's layer."""
    layer = tensor.name.rpartition("/")[2]
    last = [i for i, name in enumerate(self._order()) if f"{name}.".startswith(f"{layer}.")]
    return last[-1] if last else len(self._order())

  def json(self) -> dict[str, Any]:
    """Everything, for other programs; JSON has no NaN, so those are strings."""
    first = self.first()
    number = lambda x: x if not isinstance(x, float) or np.isfinite(x) else str(x)
    judged = lambda t: dataclasses.asdict(t) | {"allowed": t.allowed, "equal": t.equal}
    row = lambda t: {name: number(x) for name, x in judged(t).items()}
    return {
      "equal": self.equal,
      "mesh": self.axes,
      "steps": self.steps,
      "first": first and {"said": first[0]} | row(first[1]),
      "tensors": [row(t) for t in self._worst_first()],
    }

  def print(self, rows: int) -> None:
    """The table, the worst first, and what it comes to."""
    console = tables()
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("name", overflow="fold")
    for title in ("norm", "differs by", "allowed", "at step"):
      table.add_column(title, justify="right", no_wrap=True)
    shown = self._worst_first()[:rows]
    for t in shown:
      numbers = (f"{x:.1e}" for x in (t.norm, t.difference, t.allowed))
      style = None if t.equal else "bold red"
      table.add_row(t.kind, t.name, *numbers, str(t.step), style=style)
    console.print(table)
    if len(shown) < len(self.tensors):
      console.print(
        f"... and {len(self.tensors) - len(shown)} that differ by less", highlight=False
      )
    for line in self.verdict():
      console.print(line, soft_wrap=True, highlight=False)

  def verdict(self) -> list[str]:
    """What the table comes to, in sentences."""
    axes = ", ".join(f"{axis}={n}" for axis, n in self.axes.items())
    of = f"{len(self.tensors)} tensors of {self.steps} steps"
    lines = []
    if blind := [t for t in self.tensors if t.equal and t.allowed > BLIND]:
      lines.append(
        f"{len(blind)} tensors are mostly rounding, on one device too, and show large faults only: "
        f"{', '.join(sorted({t.name for t in blind})[:3])}{', ...' if len(blind) > 3 else ''}"
      )
    if (first := self.first()) is None:
      return [*lines, f"equal: {of} on the mesh ({axes}) and on one device"]
    said, t = first
    return [
      *lines,
      f"NOT EQUAL: {len(self.different())} of {of} differ on the mesh ({axes}) from one device",
      f"{said}, by {t.difference:.1e} of its norm, where rounding allows {t.allowed:.1e}",
    ]

  def _worst_first(self) -> list[Tensor]:
    return sorted(self.tensors, key=_excess, reverse=True)


def _excess(tensor: Tensor) -> float:
  """How many times what is allowed a tensor differs by."""
  difference = tensor.difference / tensor.allowed
  return difference if np.isfinite(difference) else np.inf
