"""Why a step does not fit, and the smallest changes with which it would.

The compiler names no tensor when it gives up, so the step is traced, which needs no compiler, and
the largest arrays of the program as it is written are listed; the compiler fuses some of them away.
Changes are weighed in closed form: the compiler's own figure, in the proportion in which the closed
form changes.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_args

from bigtrain.experiment import Experiment
from bigtrain.models.remat import INPUT, Remat
from bigtrain.models.transformer import TransformerConfig
from bigtrain.plan.closed import Sizes, guess
from bigtrain.plan.compile import Compiled
from bigtrain.plan.memory import place
from bigtrain.plan.network import Network
from bigtrain.plan.search import applied, can_be, pasted
from bigtrain.plan.topologies import Topology

GiB = 2**30
UNITS = {"K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Traced:
  """An array of the traced program, as one chip holds it."""

  where: str  # The part of the model.
  shape: str
  bytes: int
  made_by: tuple[str, ...]  # The operations that each make one like it.


@dataclasses.dataclass(frozen=True)
class Change:
  """Settings that may fit."""

  settings: dict[str, Any]
  memory: float  # Bytes of each chip.
  slower: float  # Of a step, by closed form; 1 is as fast.

  def line(self) -> str:
    return pasted(self.settings)


def wanted(compiled: Compiled) -> float | None:
  """Bytes that each chip would need by the compiler's message; None if it does not say."""
  found = re.search(r"temporaries \(([\d.]+)([KMGT])\)", compiled.problem)
  if found is None:
    return None
  return float(found[1]) * UNITS[found[2]] + compiled.state_bytes


def largest(experiment: Experiment, topology: Topology, few: int = 12) -> list[Traced]:
  """The largest arrays that the step makes, those alike once."""
  import jax

  from bigtrain.program import Program
  from bigtrain.sharding import batch_sharding

  mesh = experiment.mesh.make(topology.devices())
  spec = experiment.data.make(experiment.seed).spec(experiment.batch)
  with jax.set_mesh(mesh):
    program, rows = Program(experiment, mesh), batch_sharding()
    batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for k, s in spec.items()}
    traced = jax.make_jaxpr(program.step)(program.abstract(), batch)
  found: dict[Any, Traced] = {}
  for t in _arrays(traced.jaxpr, dict(mesh.shape), ""):
    same = found.setdefault((t.where, t.shape), t)
    if t.made_by[0] not in same.made_by:
      found[t.where, t.shape] = dataclasses.replace(same, made_by=same.made_by + t.made_by)
  return sorted(found.values(), key=lambda t: -t.bytes)[:few]


def _arrays(jaxpr, sizes: dict[str, int], outer: str) -> Iterator[Traced]:
  for equation in jaxpr.eqns:
    scope = f"{outer}/{equation.source_info.name_stack}"
    for var in equation.outvars:
      has_size = getattr(var.aval, "shape", None) and hasattr(var.aval, "dtype")
      if has_size and not _is_laid_by_compiler(var.aval):
        yield _traced(var.aval, scope, equation.primitive.name, sizes)
    for inner in _inner(equation.params):
      yield from _arrays(inner, sizes, scope)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for found in value if isinstance(value, (tuple, list)) else (value,):
      found = getattr(found, "jaxpr", found)
      if hasattr(found, "eqns"):
        yield found


def _is_laid_by_compiler(aval) -> bool:
  """Whether the type does not say what a chip holds, as inside a look-up with `out_sharding`."""
  sharding = getattr(aval, "sharding", None)
  return sharding is not None and bool(sharding.mesh.auto_axes)


def _traced(aval, scope: str, primitive: str, sizes: dict[str, int]) -> Traced:
  dims = list(aval.shape)
  sharding = getattr(aval, "sharding", None)
  for i, axes in enumerate(sharding.spec.partitions if sharding is not None else ()):
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      dims[i] //= sizes.get(axis, 1)
  size = getattr(aval.dtype, "itemsize", 4)
  for n in dims:
    size *= n
  shape = f"{aval.dtype}[{','.join(map(str, dims))}]"
  return Traced(place(scope) or "step", shape, size, (primitive,))


def changes(e: Experiment, topology: Topology, compiled: Compiled) -> list[Change]:
  """Small changes that fit, the cheapest first; of more microbatches only the fewest."""
  if not isinstance(e.model, TransformerConfig) or (needs := wanted(compiled)) is None:
    return []
  sizes, devices = Sizes.of(e), topology.devices()
  of = lambda made: guess(made, topology, sizes, Network.of(topology, made.mesh.make(devices)))
  now, found = of(e), []
  for settings in _single(e, topology):
    made = applied(e, settings)
    if not can_be(made, topology.chips):
      continue
    then = of(made)
    rest = (needs - now.state) * (then.memory - then.state) / (now.memory - now.state)
    if then.state + rest <= topology.chip.hbm:
      found.append(Change(settings, then.state + rest, then.seconds / now.seconds))
  fewest: dict[Any, Change] = {}
  for change in found:  # With the fewest microbatches first.
    others = {flag: value for flag, value in change.settings.items() if flag != "microbatches"}
    fewest.setdefault(tuple(others.items()) or "microbatches", change)
  return sorted(fewest.values(), key=lambda c: (c.slower, c.memory))


def _single(e: Experiment, topology: Topology) -> Iterator[dict[str, Any]]:
  model: Any = e.model
  for n in (2, 4, 8, 16, 32, 64):
    yield {"microbatches": e.microbatches * n}
  for remat in get_args(Remat):
    if remat != model.remat and not model.recompute:  # Which names what another may not keep.
      yield {"model.remat": remat}
  if hasattr(e.objective, "loss_chunk"):
    for chunk in (4096, 1024):
      yield {"objective.loss_chunk": chunk}
  for tensor in (2, 4, 8):
    yield {"mesh.fsdp": -1, "mesh.tensor": tensor * e.mesh.tensor}
  if model.remat != "full" and not model.recompute:
    for n in (2, 4, 8, 16):
      yield {"model.remat": "full", "microbatches": e.microbatches * n}
  yield {"optimizer_on_host": True}
  if (kept := model.kept()) is not None:
    yield {"model.offload": (INPUT, *kept)}
