"""Collectives and links: which mesh axes one spans, and a stated model of how long it takes.

A link of the torus carries `chip.link` bytes a second each way. A collective over a group uses all
torus axes along which its chips differ: both directions of an axis that is closed, one of an open
one, where the chip at the end receives everything through one link. So of V bytes that every chip
has in the end (all-gather) or in the beginning (reduce-scatter), V (n - 1) / n pass at that rate;
an all-reduce is both; in an all-to-all each byte goes a quarter of the way round, or half of an
open axis; a permutation moves its bytes over one link. Latency, hops of a permutation and links
that two collectives share are not counted. Between slices the rate is that of the data center's
network.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from bigtrain.plan.hlo import Instruction
from bigtrain.plan.topologies import Topology

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Network:
  """Chips in the order of a mesh's devices: their places in the torus, and their slices."""

  topology: Topology
  axes: dict[str, int]  # The mesh's, from the slowest to the fastest.
  places: np.ndarray  # (chips, torus axes).
  slices: np.ndarray  # (chips,).

  @classmethod
  def of(cls, topology: Topology, mesh) -> "Network":
    """The network under a mesh of the topology's devices."""
    devices = mesh.devices.flatten()
    places = list(np.ndindex(topology.shape)) * topology.slices
    if devices[0].platform == "tpu":
      places = [device.coords[: topology.chip.axes] for device in devices]
    slices = [getattr(d, "slice_index", None) or 0 for d in devices]
    return cls(topology, dict(mesh.shape), np.asarray(places), np.asarray(slices))

  def group(self, i: Instruction) -> tuple[list[int], tuple[str, ...]]:
    """The chips of a collective's first group, and the mesh axes that it spans."""
    named = re.search(r"replica_groups=mesh\[[^\]]*\]\s*(?:\([^)]*\)\s*)?\{([^}]*)\}", i.attributes)
    if named:  # As in replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}.
      spans = tuple(a for a in self.axes if a in re.findall(r"'(\w+)'", named[1]))
      return self.along(spans), spans
    chips = _listed(i.attributes) or list(range(len(self.places)))
    return chips, self._spans(chips)

  def _spans(self, chips: list[int]) -> tuple[str, ...]:
    """The mesh axes along which these chips differ."""
    where = np.unravel_index(chips, tuple(self.axes.values()))
    return tuple(a for a, at in zip(self.axes, where, strict=True) if len(set(at.tolist())) > 1)

  def across(self) -> tuple[list[int], tuple[str, ...]]:
    """The chips at the first one's place in every slice, and the mesh axes that they span."""
    chips = np.flatnonzero((self.places == self.places[0]).all(1)).tolist()
    return chips, self._spans(chips)

  def along(self, axes: Iterable[str]) -> list[int]:
    """The chips that differ from the first along these mesh axes alone."""
    grid = np.arange(len(self.places)).reshape(tuple(self.axes.values()))
    return grid[tuple(slice(None) if a in axes else 0 for a in self.axes)].reshape(-1).tolist()

  def seconds(self, kind: str, size: int, group: list[int], rings: int = 0) -> float:
    """Of one collective that moves `size` bytes (whole, of one chip) within a group.

    `rings`, where the compiler says it, is among how many rings its bytes are divided; each sends
    one way over one link at a time.
    """
    n, chip = len(group), self.topology.chip
    if n < 2:
      return 0.0
    if len(set(self.slices[group].tolist())) > 1:
      return self._factor(kind, n, closed=True) * size / chip.dcn
    if chip.platform == "gpu":
      return self._factor(kind, n, closed=True) * size / chip.link
    if kind == "collective-permute":
      return size / chip.link
    if rings:
      return self._factor(kind, n, closed=True) * size / (rings * chip.link)
    rates, all_closed = 0.0, True
    for axis, whole in enumerate(self.topology.shape):
      along = set(self.places[group][:, axis].tolist())
      if len(along) > 1:
        closed = len(along) == whole and self._closed(whole)
        rates += (2 if closed else 1) * chip.link
        all_closed &= closed
    return self._factor(kind, n, all_closed) * size / (rates or chip.link)

  def _factor(self, kind: str, n: int, closed: bool) -> float:
    share = (n - 1) / n
    return {
      "all-reduce": 2 * share,
      "all-to-all": 0.5 * share if closed else share,
      "ragged-all-to-all": 0.5 * share if closed else share,
      "collective-permute": 1.0,
    }.get(kind, share)

  def _closed(self, size: int) -> bool:
    """Whether a whole torus axis of that size is a ring."""
    chip = self.topology.chip
    if chip.wraps == "4":  # Cubes of 4x4x4 are joined by switches, which also close them.
      return all(n % 4 == 0 for n in self.topology.shape)
    return str(size) == chip.wraps


def size(i: Instruction) -> int:
  """Bytes that a collective moves: its larger side, as a chip sees it.

  One that is started prints its operands, of which the compiler may have combined several, and then
  its results; an all-reduce prints results alone.
  """
  found = [a.bytes for a in i.arrays]
  if not i.opcode.endswith("-start"):
    return sum(found)
  n = len(i.operands)
  return max(sum(found[:n]), sum(found[n : 2 * n]))


def _listed(attributes: str) -> list[int]:
  """The first group of replica_groups={{0,1},...} or [2,8]<=[4,4]T(1,0); pairs of a permutation."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
    return [int(pairs[1]), int(pairs[2])]
  if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return [int(i) for i in groups[1].split(",")]
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if not iota:
    return []
  numbers = lambda text: [int(n) for n in text.split(",")]
  ids = np.arange(np.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
  if iota[3]:
    ids = ids.transpose(numbers(iota[3]))
  return ids.reshape(numbers(iota[1]))[0].tolist()
