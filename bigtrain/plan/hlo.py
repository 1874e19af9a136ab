"""Optimized HLO text, read: computations, instructions, shapes, loops, FLOPs and the cycles in it.

The compiler schedules a program before it prints it: the instructions of a computation stand in the
order in which they are issued.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
HBM, HOST = 0, 5  # Memory spaces; that of the chip a layout need not name. 1 is the vector unit's.
ALIASES = ("get-tuple-element", "tuple", "bitcast", "opt-barrier", "parameter", "constant")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape, with its layout."""

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""  # As in {1,0:T(8,128)S(1)}: from the minor dim to the major one, tiles, memory.

  @property
  def space(self) -> int:
    found = re.search(r"S\((\d+)\)", self.layout)
    return int(found[1]) if found else HBM

  @property
  def itemsize(self) -> float:
    digits = re.search(r"\d+", self.dtype)
    return BYTES.get(self.dtype, int(digits[0]) / 8 if digits else 4)

  @property
  def bytes(self) -> int:
    """Of its elements alone."""
    return round(math.prod(self.dims) * self.itemsize)

  @property
  def padded(self) -> int:
    """Bytes that it takes in memory, where tiles are filled up."""
    tile = re.search(r"T\(([\d,]+)\)", self.layout)
    order = [int(d) for d in self.layout.partition(":")[0].split(",") if d.isdigit()]
    sizes = [self.dims[d] for d in order] if len(order) == len(self.dims) else [*self.dims[::-1]]
    for i, unit in enumerate(reversed(tile[1].split(",")) if tile else ()):
      if i < len(sizes):
        sizes[i] = -(-sizes[i] // int(unit)) * int(unit)
    return round(math.prod(sizes) * self.itemsize)


def arrays(shape: str) -> list[Array]:
  """The arrays of a shape, those of nested tuples in order."""
  found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
  return [Array(kind, tuple(map(int, filter(None, d.split(",")))), at) for kind, d, at in found]


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]  # Names; of a constant or a parameter, what stands between its parens.
  attributes: str
  root: bool = False

  @functools.cached_property
  def arrays(self) -> list[Array]:
    return arrays(self.shape)

  @property
  def called(self) -> tuple[str, ...]:
    """The computations of a fusion, call, while or conditional."""
    one = re.findall(r"\b(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)", self._head)
    some = re.search(r"branch_computations=\{([^}]*)\}", self._head)
    branches = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", self._head)
    return (*one, *(re.findall(r"[\w.\-]+", some[1]) if some else ()), *branches)

  @property
  def cycles(self) -> int | None:
    """The compiler's own estimate of one execution; None if it made none."""
    found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
    return int(found[1]) if found else None

  @property
  def scope(self) -> str:
    """Where in the program it is from, as in "jit(step)/jvp()/while/body/block0/attention/mul"."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def target(self) -> str:
    """Of a custom call, what it calls."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""

  def attribute(self, name: str) -> str | None:
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self._head)
    return found[1] if found else None

  @property
  def _head(self) -> str:
    """The attributes without the configuration, which is long and looks like them."""
    return self.attributes.partition("backend_config=")[0]


@dataclasses.dataclass(frozen=True)
class Computation:
  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {i.name: i for i in self.instructions}

  @property
  def root(self) -> Instruction:
    return next((i for i in self.instructions if i.root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: str

  def inner(self, instruction: Instruction) -> Iterator[Instruction]:
    """All instructions of a fusion, those of nested fusions too."""
    for name in instruction.called:
      for found in self.computations[name].instructions:
        yield found
        if found.opcode == "fusion":
          yield from self.inner(found)

  def products(self, instruction: Instruction, computation: Computation) -> float:
    """FLOPs of the matrix products in an instruction."""
    if instruction.opcode != "fusion":
      return _product(instruction, computation)
    total = 0.0
    for name in instruction.called:
      inside = self.computations[name]
      total += sum(self.products(i, inside) for i in inside.instructions)
    return total

  def trips(self, loop: Instruction, computation: Computation) -> int | None:
    """How often the body of a while loop is executed; None if that does not stand in the text."""
    known = re.search(r'known_trip_count"?[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    condition = loop.attribute("condition")
    if condition is None:
      return None
    inside = self.computations[condition.lstrip("%")]
    test = inside.root
    if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
      return None
    counter, bound = (_source(inside, name) for name in test.operands)
    start = _source(computation, loop.operands[0])
    if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
      return None
    first = 0
    if start.opcode == "tuple":
      at = int(counter.attribute("index") or 0)
      begin = _source(computation, start.operands[at])
      first = int(begin.operands[0]) if begin.opcode == "constant" else 0
    return int(bound.operands[0]) - first + (test.attribute("direction") == "LE")


def parse(text: str) -> Module:
  """The module that XLA printed. Raises ValueError if there is no entry computation in it."""
  computations: dict[str, Computation] = {}
  entry, name, lines = "", "", []
  for line in text.splitlines():
    if not name:
      if begin := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
        name, lines = begin[2], []
        entry = name if begin[1] else entry
    elif re.match(r"\}(, execution_thread=.*)?\s*$", line):
      found = tuple(i for i in map(_instruction, lines) if i is not None)
      computations[name], name = Computation(name, found), ""
    elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
      lines.append(line)
    elif lines:  # Some attributes, such as those of kernels, hold text of several lines.
      lines[-1] += line
  if entry not in computations:
    raise ValueError("this is no text of an HLO module: there is no entry computation")
  return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
  line = re.sub(r"/\*index=\d+\*/", "", line).strip()
  found = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
  if not found:
    return None
  rest = line[found.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.find("(")
  closing = _closing(rest, opening)
  opcode, inside, attributes = rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :]
  names = re.findall(r"%([\w.\-]+)", inside) if "%" in inside else [inside.strip()]
  operands = () if inside == "" else tuple(names)
  return Instruction(found[2], opcode, shape, operands, attributes, bool(found[1]))


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens there is closed."""
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text) - 1


def _source(computation: Computation, name: str) -> Instruction:
  """What a value is, behind copies of it."""
  found = computation.by_name[name]
  while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "opt-barrier"):
    found = computation.by_name[found.operands[0]]
  return found


def _product(i: Instruction, computation: Computation) -> float:
  """FLOPs of a dot, a convolution or a call of cuBLAS; 0 of all else."""
  if i.target.startswith("__cublas"):
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    contracted = re.findall(r"\d+", dims[1]) if dims else ()
    left = computation.by_name[i.operands[0]].arrays[0].dims
    return 2.0 * math.prod(i.arrays[0].dims) * math.prod(left[int(d)] for d in contracted)
  if i.opcode not in ("dot", "convolution"):
    return 0.0
  left, right = (computation.by_name[name].arrays[0].dims for name in i.operands[:2])
  out = i.arrays[0].dims
  if i.opcode == "dot":
    contracted = re.findall(r"\d+", i.attribute("lhs_contracting_dims") or "")
    return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted)
  _, kernel_dims, out_dims = re.split("_|->", i.attribute("dim_labels") or "")
  spatial = [label for label in out_dims if label.isdigit()]
  sizes = dict(zip(out_dims, out, strict=True))
  inputs = dict(zip(re.split("_|->", i.attribute("dim_labels") or "")[0], left, strict=True))
  kernel = dict(zip(kernel_dims, right, strict=True))
  window = _window(i.attribute("window") or "", len(spatial))
  taps = math.prod(_taps(inputs[s], kernel[s], sizes[s], window[int(s)]) for s in spatial)
  return 2.0 * sizes["b"] * sizes["f"] * kernel["i"] * taps


def _window(text: str, spatial: int) -> list[dict[str, tuple[int, ...]]]:
  """{setting: numbers} of each spatial dim."""
  found: list[dict[str, tuple[int, ...]]] = [{} for _ in range(spatial)]
  for name, values in re.findall(r"(\w+)=([\w\-]+)", text):
    for at, value in enumerate(values.split("x")):
      found[at][name] = tuple(int(v) for v in value.split("_"))
  return found


def _taps(size: int, kernel: int, out: int, window: dict[str, tuple[int, ...]]) -> int:
  """How many pairs of an output and an input position meet along one spatial dim.

  The compiler writes batch dims as spatial ones of dilated inputs, where few pairs do.
  """
  one = lambda name: window.get(name, (1,))[0]
  low = window.get("pad", (0, 0))[0]
  dilation = one("lhs_dilate")
  at = np.arange(out)[:, None] * one("stride") + np.arange(kernel) * one("rhs_dilate") - low
  meets = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
  return int(meets.sum())
