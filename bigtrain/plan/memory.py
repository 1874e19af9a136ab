"""What fills a chip's memory at the peak of a step: by kind, and by layer.

Parameters and optimizer state are known exactly, by name. What else is alive at the peak is what
live.py finds, told apart by where in the program it is from: JAX writes "jvp" around the forward
pass, "transpose(jvp)" around the backward pass, and "rematted_computation" around what is computed
again.
"""

import dataclasses
import re
from collections import defaultdict

from bigtrain.plan import live
from bigtrain.plan.compile import Leaf
from bigtrain.plan.hlo import Module
from bigtrain.plan.live import Buffer

KINDS = (
  "parameters",
  "optimizer state",
  "other arguments",
  "gathered parameters",
  "gradients",
  "kept activations",
  "temporaries",
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A buffer at the peak."""

  kind: str
  where: str  # The parameter's name, or the part of the model that made it.
  shape: str  # Such as "bf16[16,4,2048,2048]".
  bytes: int


def tensors(module: Module, state: list[Leaf]) -> list[Tensor]:
  """What is alive at the peak on each chip, the largest first; `state` is what the step takes."""
  found = [_named(buffer, state) for buffer in live.at_peak(module) if buffer.bytes]
  return sorted(found, key=lambda t: -t.bytes)


def by(field: str, found: list[Tensor]) -> dict[str, int]:
  """Bytes by "kind" or "where", the most first."""
  sums: dict[str, int] = defaultdict(int)
  for tensor in found:
    sums[getattr(tensor, field)] += tensor.bytes
  return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _named(buffer: Buffer, state: list[Leaf]) -> Tensor:
  kind, where = _kind(buffer, state)
  dims = ",".join(map(str, buffer.array.dims))
  return Tensor(kind, where, f"{buffer.array.dtype}[{dims}]", buffer.bytes)


def _kind(buffer: Buffer, state: list[Leaf]) -> tuple[str, str]:
  scope, dims = buffer.made.scope, buffer.array.dims
  if buffer.argument is not None:
    number = re.fullmatch(r"leaves\[(\d+)\]", scope)
    if not number:
      return "other arguments", re.sub(r"[\\']", "", scope) or "step"
    leaf = state[int(number[1])]
    kind = {"model": "parameters", "optimizer": "optimizer state"}.get(leaf.group)
    return kind or "other arguments", leaf.name
  alike = [leaf for leaf in state if leaf.group == "model" and len(dims) and leaf.is_like(dims)]
  if "all-gather" in buffer.made.opcode or "all_gather" in scope:
    return "gathered parameters", _names(alike) if alike else place(scope)
  if alike and "rematted" not in scope:
    # A cast or a slice of a parameter is made before any cotangent is there.
    backward = "transpose(" in scope or buffer.array.dtype == "f32" or buffer.made.opcode in SUMS
    return "gradients" if backward else "gathered parameters", _names(alike)
  used = buffer.last.scope if buffer.last is not None else ""
  if "transpose(" not in scope and ("transpose(" in used or buffer.made.opcode == "custom-call"):
    return "kept activations", place(scope) or "every layer"
  return "temporaries", place(scope)


def _names(alike: list[Leaf]) -> str:
  """Of parameters whose shapes are the same, which is not told apart."""
  first, *others = (leaf.name for leaf in alike)
  return " or ".join([first, *(name.rpartition(".")[2] for name in others)])


SUMS = ("all-reduce", "reduce-scatter", "custom-call")


PARTS = "attention|feed_forward|across|experts|router"  # Named scopes inside a block.


def place(scope: str) -> str:
  """The part of the model in a scope: "block0.attention", "embed", "loss"; "" if there is none."""
  block = re.search(r"block\d+", scope)
  if block:
    inside = re.findall(rf"/({PARTS})/", scope[block.end() :] + "/")
    return f"{block[0]}.{inside[-1]}" if inside else block[0]
  found = re.search(r"\b(loss|embed)\b", scope)
  return found[1] if found else ""
