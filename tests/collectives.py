"""The collectives of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

KIND = r"all-to-all|all-\w+|reduce-scatter|ragged-all-to-all|collective-\w+"
INSTRUCTION = re.compile(rf"= (?P<type>\S+|\(.*?\)) (?P<kind>{KIND})(-start)?\(")
# How XLA writes groups of devices: all of them, as an array that is reshaped, or as axes of a mesh.
LITERAL = re.compile(r"replica_groups=\{\{([\d,]+)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
AXES = re.compile(
  r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)


class Collective(NamedTuple):
  """What one collective does with one array; the compiler may do it with several at once."""

  kind: str
  axes: tuple[str, ...]  # Of the mesh, along which the devices that exchange lie.
  elements: int  # Of the result on one device.


def collectives(compiled, mesh: jax.sharding.Mesh) -> list[Collective]:
  """Every array of every collective, once if it is in a loop; those within a device left out."""
  found = []
  for line in compiled.as_text().splitlines():
    if match := INSTRUCTION.search(line):
      axes = _axes(_group(line, mesh.size), mesh)
      for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", match["type"]):
        found.append(Collective(match["kind"], axes, math.prod(_numbers(dims))))
  return [c for c in found if c.axes]


def _group(line: str, devices: int) -> np.ndarray:
  """The positions in the mesh of the devices of the first group; all for a permutation."""
  if found := LITERAL.search(line):
    return np.array(_numbers(found[1]))
  if found := IOTA.search(line):
    return _iota(found[2], found[3]).reshape(_numbers(found[1]))[0]
  if found := AXES.search(line):
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", found[1]), strict=True)
    wanted = re.findall(r"'(\w+)'", found[4])
    assert ":" not in found[4], f"part of an axis: {found[0]}"
    ids = _iota(found[2] or str(devices), found[3]).reshape([*map(int, sizes)])
    return ids[tuple(slice(None) if name in wanted else 0 for name in names)].ravel()
  assert "collective-permute" in line, line
  return np.arange(devices)


def _iota(shape: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(order)) if order else ids


def _axes(group: np.ndarray, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  """The axes of the mesh along which these devices differ."""
  where = np.unravel_index(group, mesh.devices.shape)
  return tuple(a for a, i in zip(mesh.axis_names, where, strict=True) if len(np.unique(i)) > 1)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]
