"""Which buffers are alive when a scheduled program takes most memory.

XLA tells the size of the peak but not what is in it, so its buffers are followed here: what an
instruction makes is a buffer in HBM, unless it is the memory of an operand (a loop's carry, an
update in place, what the attributes say is aliased), and it lives to its last use. Gaps between
buffers are not seen; on the programs of docs/plan.md the sum is within 1% of XLA's own figure.
"""

import dataclasses
import itertools
import re
from typing import Any

from bigtrain.plan.hlo import ALIASES, HBM, Array, Computation, Instruction, Module, arrays

FIRST = ("copy-done", "all-reduce-done", "bitcast", "opt-barrier")


@dataclasses.dataclass(eq=False)
class Buffer:
  """Memory that one instruction makes."""

  array: Array
  made: Instruction
  argument: int | None = None  # The number of the program's parameter that it is.
  last: Instruction | None = None  # That uses it.

  @property
  def bytes(self) -> int:
    return self.array.padded if self.array.space == HBM else 0


Tree = Any  # A Buffer, or a list of trees.


def at_peak(module: Module) -> list[Buffer]:
  """The buffers in HBM at the moment when they are largest together, the arguments included."""
  return _Liveness(module).peak(module.entry, None)


class _Liveness:
  def __init__(self, module: Module):
    self.module = module

  def peak(self, name: str, given: Tree | None) -> list[Buffer]:
    """The buffers at the peak of a computation, of what it was `given` only where that is None."""
    computation = self.module.computations[name]
    values, used, made = self._follow(computation, given)
    kept = set(map(id, _leaves(values[computation.root.name])))
    alive: dict[int, list[Buffer]] = {}  # By the last place at which they are used.
    # An argument's memory is the caller's, or that of a result, wherever it stands in the schedule.
    live = {id(b): b for b in itertools.chain(*made) if b.argument is not None}
    best, best_size = [], -1
    for at, instruction in enumerate(computation.instructions):
      for buffer in made[at]:
        if buffer.argument is not None or id(buffer) in kept:
          continue  # A result lies in an argument's memory, or in what the loop carries.
        live[id(buffer)] = buffer
        alive.setdefault(used.get(id(buffer), at), []).append(buffer)
      inner = self._inner(instruction, computation, values)
      size = sum(b.bytes for b in live.values()) + sum(b.bytes for b in inner)
      if size > best_size:
        best, best_size = [*live.values(), *inner], size
      for buffer in alive.pop(at, ()):
        live.pop(id(buffer), None)
    return best

  def _inner(self, i: Instruction, computation: Computation, values) -> list[Buffer]:
    if i.opcode not in ("while", "call", "conditional"):
      return []
    operands = [values[name] for name in i.operands]
    tree = operands[0] if i.opcode == "while" else operands
    peaks = [self.peak(name, tree if i.opcode == "while" else None) for name in i.called]
    if i.opcode != "while":
      peaks = [[b for b in peak if b.argument is None] for peak in peaks]
    return max(peaks, key=lambda p: sum(b.bytes for b in p), default=[])

  def _follow(self, computation: Computation, given: Tree | None):
    """(what each name is, where each buffer is last used, what each instruction makes)."""
    values: dict[str, Tree] = {}
    used: dict[int, int] = {}
    made: list[list[Buffer]] = [[] for _ in computation.instructions]
    waiting: dict[int, Buffer] = {}
    for at, i in enumerate(computation.instructions):
      if i.opcode not in ALIASES:
        for buffer in itertools.chain(*(_leaves(values.get(name, [])) for name in i.operands)):
          if id(buffer) in waiting:
            made[at].append(waiting.pop(id(buffer)))
          used[id(buffer)], buffer.last = at, i
      here: list[Buffer] = []
      values[i.name] = self._value(i, computation, values, given, here)
      if i.target == "AllocateBuffer":  # It takes memory from its first use on.
        waiting |= {id(buffer): buffer for buffer in here}
      else:
        made[at] += here
    return values, used, made

  def _value(self, i: Instruction, computation, values, given, here: list[Buffer]) -> Tree:
    operands = [values.get(name, []) for name in i.operands]
    if i.opcode == "parameter":
      if given is not None:
        return given
      return _fresh(i, here, argument=int(i.operands[0]))
    if i.opcode == "tuple":
      return operands
    if i.opcode == "get-tuple-element":
      at = int(i.attribute("index") or 0)
      return operands[0][at] if isinstance(operands[0], list) and operands[0] else []
    if i.opcode == "while" or i.opcode in FIRST:
      first = operands[0]
      return first[0] if i.opcode.endswith("-done") and isinstance(first, list) else first
    if i.opcode == "recv-done":
      return [operands[0][0], []]
    if i.opcode.endswith("-done"):
      return operands[0][1] if isinstance(operands[0], list) and len(operands[0]) > 1 else []
    if i.opcode == "dynamic-update-slice":
      return operands[0]
    tree = _fresh(i, here)
    if i.opcode == "send":
      self._replace(tree, 0, operands[0], here)
    if i.opcode.endswith("-start") and operands and len(tree) > 1:
      source = 1 if i.opcode == "copy-start" else 0
      self._replace(tree, source, operands[0], here)
    for path, operand, inner in _aliases(i, self.module):
      found = operands[operand] if operand < len(operands) else []
      for index in inner:
        found = found[index] if isinstance(found, list) and index < len(found) else []
      if not path:
        here[:] = [b for b in here if b not in _leaves(tree)]
        return found
      self._replace(tree, path[0], found, here)
    return tree

  def _replace(self, tree: Tree, at: int, by: Tree, here: list[Buffer]) -> None:
    """Puts an operand's memory in the place of a new buffer."""
    gone = _leaves(tree[at])
    here[:] = [b for b in here if b not in gone]
    tree[at] = by


def _aliases(i: Instruction, module: Module) -> list[tuple[list[int], int, list[int]]]:
  """(path in the result, operand, path in it) of each result that is an operand's memory."""
  found = []
  text = re.search(r"output_to_operand_aliasing=\{(.*?\)\})", i.attributes)
  for path, operand, inner in re.findall(
    r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", text[1] if text else ""
  ):
    numbers = lambda s: [int(n) for n in re.findall(r"\d+", s)]
    found.append((numbers(path), int(operand), numbers(inner)))
  if i.opcode != "fusion" or found:
    return found
  inside = module.computations[i.called[0]]
  roots = [inside.root]
  if inside.root.opcode == "tuple":
    roots = [inside.by_name[name] for name in inside.root.operands]
  for at, root in enumerate(roots):
    if (number := _updated(root, inside)) is not None:
      found.append(([at] if inside.root.opcode == "tuple" else [], number, []))
  return found


def _updated(root: Instruction, inside: Computation) -> int | None:
  """The number of the parameter in whose memory an update in place is made."""
  updates = False
  while root.opcode in ("bitcast", "dynamic-update-slice"):
    updates |= root.opcode == "dynamic-update-slice"
    root = inside.by_name[root.operands[0]]
  return int(root.operands[0]) if updates and root.opcode == "parameter" else None


def _fresh(i: Instruction, here: list[Buffer], argument: int | None = None) -> Tree:
  """A new buffer for every array of an instruction's shape."""

  def tree(shape: str) -> Tree:
    if shape.startswith("("):
      return [tree(part) for part in _split(shape[1:-1])]
    buffer = Buffer(arrays(shape)[0] if arrays(shape) else Array("token", (0,)), i, argument)
    here.append(buffer)
    return buffer

  return tree(i.shape)


def _split(text: str) -> list[str]:
  """The parts between the commas that stand in no brackets."""
  parts, depth, begin = [], 0, 0
  for at, letter in enumerate(text):
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and depth == 0:
      parts.append(text[begin:at].strip())
      begin = at + 1
  return [*parts, text[begin:].strip()] if text.strip() else []


def _leaves(tree: Tree) -> list[Buffer]:
  if isinstance(tree, Buffer):
    return [tree]
  return [leaf for part in tree for leaf in _leaves(part)]
