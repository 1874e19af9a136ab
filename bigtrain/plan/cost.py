"""The predicted time of a step: the compiler's own cycles, loops counted, and models for the rest.

- An instruction with `estimated_cycles` takes these at the chip's clock. Those with a matrix
  product in them are "matrix", the others "vector".
- A kernel carries no estimate. Attention, by Pallas or cuDNN, is counted by its products at 60% of
  peak, two forward, five in a fused backward pass (three and four where it is two kernels): all of
  each where every query sees every key, and the half that a causal mask leaves where there is a
  mask or nothing tells. Others take what their own cost estimate says, as a roofline.
- What else carries none (a gather, a scatter, a sort, a copy) takes the time to read and write its
  bytes: "moved".
- Collectives take what network.py says. Compute and network are two queues: an asynchronous
  collective begins when it is issued and the network is free, and what is left of it at its end is
  "exposed"; a synchronous one is exposed as a whole. A loop's body is timed once and multiplied.
- A collective that runs on the sparse cores is asynchronous from when it is given its operand, and
  goes over as many rings at once as the compiler writes that it has.
- Copies to and from the host's memory are two queues more, at the rate of its bus. Asynchronous
  copies between the chip's own memories are taken to be hidden.
"""

import dataclasses
import math
import re
from collections import defaultdict

from bigtrain.plan import network
from bigtrain.plan.hlo import ALIASES, HBM, HOST, Computation, Instruction, Module
from bigtrain.plan.network import KINDS, Network

CUDNN = "$fmha"  # In the names of its kernels of attention.
ATTENTION = 0.6  # Of peak, forward and backward.
PARTS = ("matrix", "vector", "kernels", "moved", "exposed")
# Between chips, between slices over the data center's network, and to and from the host's memory.
LINKS = ("chips", "slices", "to host", "from host")
COPIES = ("copy", "dynamic-slice", "dynamic-update-slice")
FREE = (
  *ALIASES,
  "after-all",
  "partition-id",
  "replica-id",
  "iota",
  "broadcast",
  "reshape",
  "send",
  "recv",
)


@dataclasses.dataclass
class Collective:
  """One collective of the program, or one copy to or from the host, all executions in a step."""

  kind: str
  axes: tuple[str, ...]  # Of the mesh.
  bytes: int  # Of one execution, on one chip.
  times: int
  seconds: float  # All executions together, were they alone.
  exposed: float  # Seconds that nothing hides.
  asynchronous: bool
  scope: str
  link: str = "chips"  # What carries it: one of LINKS, each of which is a queue.


@dataclasses.dataclass
class Timed:
  """One instruction that computes, all executions in a step."""

  instruction: Instruction
  part: str  # One of PARTS.
  times: int
  seconds: float
  flops: float


@dataclasses.dataclass
class Cost:
  """What one step takes on each chip."""

  seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
  flops: float = 0.0  # Of matrix products that were executed, kernels included.
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  scopes: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
  timed: list[Timed] = dataclasses.field(default_factory=list)  # As they come.
  loops: int = 0  # Loops whose trip count is not in the text; their bodies are counted once.

  @property
  def step(self) -> float:
    """Seconds."""
    return sum(self.seconds.values())

  @property
  def uncounted(self) -> float:
    """Seconds of the step for which the compiler gives no estimate of its own."""
    return self.seconds["kernels"] + self.seconds["moved"]

  def add(self, other: "Cost", times: int) -> None:
    for part, seconds in other.seconds.items():
      self.seconds[part] += seconds * times
    for scope, seconds in other.scopes.items():
      self.scopes[scope] += seconds * times
    self.flops += other.flops * times
    self.loops += other.loops
    for t in other.timed:
      more = {"times": t.times * times, "seconds": t.seconds * times, "flops": t.flops * times}
      self.timed.append(dataclasses.replace(t, **more))
    for c in other.collectives:
      more = {"times": c.times * times, "seconds": c.seconds * times, "exposed": c.exposed * times}
      self.collectives.append(dataclasses.replace(c, **more))


def estimate(module: Module, links: Network) -> Cost:
  """The cost of one execution of the module's entry."""
  return _Estimate(module, links).of(module.entry)


class _Estimate:
  def __init__(self, module: Module, links: Network):
    self.module, self.links, self.chip = module, links, links.topology.chip

  def of(self, name: str) -> Cost:
    """The cost of one execution of a computation, its instructions in the order of the schedule."""
    computation, cost = self.module.computations[name], Cost()
    now = 0.0  # When the next instruction is issued.
    free: dict[str, float] = dict.fromkeys(LINKS, 0.0)  # When each link is.
    under_way: dict[str, tuple[float, Collective]] = {}
    for i in computation.instructions:
      collective = self._collective(i, computation)
      if collective is None:
        now += self._compute(i, computation, cost)
        continue
      found, phase, key = collective
      if phase != "done":
        free[found.link] = max(now, free[found.link]) + found.seconds
        under_way[key] = free[found.link], found
        cost.collectives.append(found)
      if phase != "start" and key in under_way:
        end, found = under_way.pop(key)
        found.exposed = max(0.0, end - now)
        now += found.exposed
        cost.seconds["exposed"] += found.exposed
        cost.scopes[found.scope] += found.exposed
    return cost

  def _compute(self, i: Instruction, computation: Computation, cost: Cost) -> float:
    """Adds what is no collective to the cost. Returns its seconds."""
    before = cost.step
    if i.opcode == "while":
      trips = self.module.trips(i, computation)
      cost.loops += trips is None
      cost.add(self.of(i.called[0]), 1 if trips is None else trips)
    elif i.opcode == "conditional":
      cost.add(max((self.of(name) for name in i.called), key=lambda c: c.step), 1)
    elif i.opcode == "call":
      cost.add(self.of(i.called[0]), 1)
    else:
      part, seconds, flops = self._instruction(i, computation)
      cost.seconds[part] += seconds
      cost.scopes[i.scope] += seconds
      cost.flops += flops
      cost.timed.append(Timed(i, part, 1, seconds, flops))
    return cost.step - before

  def _instruction(self, i: Instruction, computation: Computation) -> tuple[str, float, float]:
    """(part, seconds, FLOPs) of one instruction."""
    flops = self.module.products(i, computation)
    if i.cycles is not None and self.chip.clock:
      return "matrix" if flops else "vector", i.cycles / self.chip.clock, flops
    if i.opcode == "custom-call" and (i.target == "tpu_custom_call" or CUDNN in i.target):
      flops, seconds = kernel(i, computation, self.chip)
      return "kernels", seconds, flops
    moved = self._moved(i, computation) / self.chip.bandwidth
    if self.chip.clock:
      return "moved", moved, flops
    return "matrix" if flops else "vector", max(moved, flops / self.chip.bf16), flops

  def _moved(self, i: Instruction, computation: Computation) -> float:
    """Bytes that an instruction without an estimate reads from memory and writes there.

    It reads no more than what it writes: a gather takes rows of a table, not the table.
    """
    if i.opcode == "call-start":  # By the sparse cores, such as the look-up of an embedding.
      inner = self.module.computations[i.called[0]]
      if any(j.opcode in KINDS for j in inner.instructions):
        return 0.0  # It is timed as a collective from when it has its operand.
      return sum(self._moved(j, inner) for j in inner.instructions) or _written(inner.root)
    if i.opcode in FREE or i.opcode.endswith(("-start", "-done", "-update")):
      return 0.0
    if i.opcode == "custom-call":  # Such as AllocateBuffer, which does nothing.
      return 0.0
    return _written(i)

  def _collective(self, i: Instruction, within: Computation) -> tuple[Collective, str, str] | None:
    """(what, phase, key of the pair) if it is a collective; the phase is start, done or both."""
    opcode = re.sub("-(start|done)$", "", i.opcode)
    if opcode in KINDS:
      phase = i.opcode.removeprefix(opcode).removeprefix("-") or "both"
      key = i.operands[0] if phase == "done" else i.name
      return self._made(i, opcode, phase), phase, key
    if i.opcode == "send" and (kind := re.search(r'megascale_transfer_type="(\w+)"', i.attributes)):
      return self._between_slices(i, kind[1]), "start", _rendezvous(i)
    if i.opcode == "recv-done":
      return self._made(i, "", "done"), "done", _rendezvous(within.by_name[i.operands[0]])
    if re.sub("-(start|done)$", "", i.opcode) in COPIES:
      return self._copied(i)
    if i.opcode == "async-done":
      return self._made(i, "", "done"), "done", i.operands[0]
    if i.opcode in ("call-start", "call-update", "call-done"):
      return self._on_sparse_cores(i, within)
    if i.opcode not in ("fusion", "async-start"):
      return None
    inside = list(self.module.inner(i))
    found = next((j for j in inside if re.sub("-(start|done)$", "", j.opcode) in KINDS), None)
    if found is None:
      return None
    if i.opcode == "async-start":
      return self._made(found, found.opcode, "start"), "start", i.name
    targets = {j.target for j in inside if j.opcode == "custom-call"}
    channel = f"channel {found.attribute('channel_id')}"
    if "AsyncCollectiveStart" in targets:
      return self._made(found, found.opcode, "start"), "start", channel
    if "AsyncCollectiveDone" in targets:
      return self._made(found, found.opcode, "done"), "done", channel
    if i.cycles is not None:
      return None  # Compute during which a collective goes on.
    # An all-reduce of which each chip keeps a part: how older compilers print a reduce-scatter.
    made = self._made(found, found.opcode, "both")
    if found.opcode == "all-reduce" and any(j.opcode == "dynamic-slice" for j in inside):
      made.kind, made.seconds = "reduce-scatter", made.seconds / 2
    return made, "both", i.name

  def _on_sparse_cores(
    self, i: Instruction, within: Computation
  ) -> tuple[Collective, str, str] | None:
    """As `_collective`, of a call that is under way on the sparse cores.

    It is started, then given its operand (an update) unless it had that at once, then awaited.
    """
    call = i
    while call.opcode != "call-start":
      call = within.by_name[call.operands[0]]
    inside = self.module.computations[call.called[0]].instructions
    found = next((j for j in inside if j.opcode in KINDS), None)
    if found is None:
      return None
    if i.opcode == "call-done":
      return self._made(i, "", "done"), "done", call.name
    if i is call and not i.operands:
      return None
    return self._made(found, found.opcode, "start"), "start", call.name

  def _between_slices(self, i: Instruction, kind: str) -> Collective:
    """What a host sends for a chip: a collective of chips at the same place in every slice."""
    group, axes = self.links.across()
    kind, size = kind.lower().replace("_", "-"), i.arrays[0].bytes
    seconds = self.links.seconds(kind, size, group)
    return Collective(kind, axes, size, 1, seconds, 0.0, True, i.scope, "slices")

  def _copied(self, i: Instruction) -> tuple[Collective, str, str] | None:
    """As `_collective`, of a copy; None where the host has no part in it, or it is a plain one."""
    if i.opcode.endswith("-done"):
      return self._made(i, "", "done"), "done", i.operands[0]
    arrays = [a for a in i.arrays if a.dims]
    if not i.opcode.endswith("-start") or {a.space == HOST for a in arrays} != {True, False}:
      return None
    # (what is made, what is copied): a slice of it, or with a slice put into it.
    sent = i.opcode != "dynamic-slice-start" and arrays[0].space == HOST
    size = min(a.bytes for a in arrays)
    kind, seconds = "to host" if sent else "from host", size / self.chip.host
    return (
      Collective(f"copy {kind}", (), size, 1, seconds, 0.0, True, i.scope, kind),
      "start",
      i.name,
    )

  def _made(self, i: Instruction, kind: str, phase: str) -> Collective:
    if phase == "done":
      return Collective(kind, (), 0, 0, 0.0, 0.0, True, "")
    size = network.size(i)
    group, axes = self.links.group(i)
    if i.opcode == "reduce-scatter":  # What it prints is a part of what it moves.
      size *= len(group)
    seconds = self.links.seconds(kind, size, group, rings=i.attributes.count('"phase_rings"'))
    return Collective(kind, axes, size, 1, seconds, 0.0, phase == "start", i.scope)


def _rendezvous(i: Instruction) -> str:
  """What a send and its receive have in common."""
  found = re.search(r'rendezvous="([^"]*)"', i.attributes)
  return found[1] if found else i.name


def _written(i: Instruction) -> float:
  """Twice the bytes of what an instruction writes to HBM: as many are read."""
  return 2.0 * sum(a.bytes for a in i.arrays if a.space == HBM)


def kernel(i: Instruction, computation: Computation, chip) -> tuple[float, float]:
  """(FLOPs, seconds) of a Pallas kernel, or of attention by cuDNN, by the stated model."""
  cudnn = CUDNN in i.target
  name = f"{i.scope} {i.attribute('kernel_name') or ''} {i.name}"
  fused = 5 if "Backward" in i.target else 2
  products = fused if cudnn else _products_of(name, len(i.arrays))
  given = [computation.by_name[o].arrays for o in i.operands if o in computation.by_name]
  whole = [a[0].dims for a in given if a and len(a[0].dims) >= 3 and a[0].dtype in FLOATS]
  if products and len(whole) >= 2:
    q, k = whole[0], whole[1]
    keys = k[-3] if cudnn else k[-2]  # It takes (B, S, K, H), the others (..., S, H).
    flops = products * 2.0 * math.prod(q) * keys * (1.0 if _sees_all(i, name, given) else 0.5)
    return flops, flops / (ATTENTION * chip.bf16)
  said = re.search(r'"flops":"?(\d+)', i.attributes)
  moved = re.search(r'"bytes_accessed":"?(\d+)', i.attributes)
  touched = sum(a.bytes for arrays in (*given, i.arrays) for a in arrays)
  flops = float(said[1]) if said else 0.0
  size = float(moved[1]) if moved else touched
  return flops, max(flops / (ATTENTION * chip.bf16), size / chip.bandwidth)


FLOATS = ("bf16", "f32", "f16")


def _sees_all(i: Instruction, name: str, given: list) -> bool:
  """Whether a kernel of attention has no mask but that of documents, as far as its call tells.

  cuDNN's names its mask. Splash attention computes one from the columns of the queries, which it is
  then given as whole numbers besides the documents of queries and keys.
  """
  if CUDNN in i.target:
    return bool(re.search(r'"mask_type": ?"(NO_MASK|PADDING)"', i.attributes))
  rows = [a for a in given if a and a[0].dtype == "s32" and len(a[0].dims) >= 2]
  return "splash" in name and len(rows) == (2 if "segmented" in name else 0)


def _products_of(name: str, results: int) -> int:
  """How many matrix products of the size of the scores a kernel of attention makes."""
  if not re.search("attention|splash|flash|mha", name):
    return 0
  if "dkv" in name:  # A fused backward pass also returns dq.
    return 5 if results > 2 else 4
  return 3 if "dq" in name else 2
