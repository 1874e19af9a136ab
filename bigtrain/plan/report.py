"""What a plan says: tables for people, and one object for tools."""

import dataclasses
from typing import Any

from bigtrain.console import duration, human
from bigtrain.experiment import Experiment
from bigtrain.failures import OUT_OF_MEMORY
from bigtrain.plan import hlo
from bigtrain.plan.compile import Compiled, lengths
from bigtrain.plan.cost import PARTS, Collective, Cost, estimate
from bigtrain.plan.explain import changes, largest, wanted
from bigtrain.plan.memory import KINDS, Tensor, by, place, tensors
from bigtrain.plan.search import Candidate, Found

GiB = 2**30
SHOWN = 12  # Rows of a table of tensors or collectives.
TOLD = 100  # Tensors in the object for tools.
ABOUT = {
  "matrix": "instructions with a matrix product, by the compiler's cycles",
  "vector": "all other instructions, by the compiler's cycles",
  "kernels": "Pallas kernels and cuDNN's, by the stated model",
  "moved": "what carries no estimate, by its bytes",
  "exposed": "communication that no compute hides, by the links",
}
ROOFLINE = ABOUT | {
  "matrix": "instructions with a matrix product, by their FLOPs and bytes",
  "vector": "all other instructions, by their bytes",
}


@dataclasses.dataclass
class Plan:
  """A step on a topology: what it takes, and what a run takes."""

  experiment: Experiment
  compiled: Compiled
  price: float | None  # Dollars an hour of a chip.
  cost: Cost
  tensors: list[Tensor]  # At the peak, the largest first.

  @classmethod
  def of(cls, experiment: Experiment, compiled: Compiled, price: float | None) -> "Plan":
    if not compiled.text:
      return cls(experiment, compiled, price, Cost(), [])
    module = hlo.parse(compiled.text)
    cost, found = estimate(module, compiled.network), tensors(module, compiled.state)
    return cls(experiment, compiled, price, cost, found)

  @property
  def flops(self) -> float:
    """Model FLOPs of a step on one chip, by formula; 0 where there is none."""
    e = self.experiment
    return (e.model.flops(*lengths(e)) or 0.0) * e.batch / self.compiled.topology.chips

  @property
  def mfu(self) -> float:
    return self.flops / self.cost.step / self.compiled.topology.chip.bf16

  @property
  def tokens_per_second(self) -> float:
    """Of all chips; of data without tokens, examples."""
    return self.experiment.batch * sum(lengths(self.experiment)) / self.cost.step

  @property
  def hours(self) -> float:
    """Of the whole run, nothing going wrong and nothing but steps; 0 where epochs are given."""
    return self.experiment.steps * self.cost.step / 3600

  def collectives(self) -> list[Collective]:
    """Those alike as one, the longest first."""
    found: dict[Any, Collective] = {}
    for c in self.cost.collectives:
      key = c.kind, c.axes, c.bytes, c.asynchronous, c.scope
      if key in found:
        same = found[key]
        same.times += c.times
        same.seconds += c.seconds
        same.exposed += c.exposed
      else:
        found[key] = dataclasses.replace(c)
    return sorted(found.values(), key=lambda c: (-c.exposed, -c.seconds))

  def json(self) -> dict[str, Any]:
    """All of it for tools: bytes, seconds, FLOPs."""
    c, memory = self.compiled, self.compiled.memory
    found = {
      "topology": {"name": c.topology.name, "slices": c.topology.slices, "chips": c.topology.chips},
      "mesh": {axis: n for axis, n in c.network.axes.items() if n > 1},
      "compile_seconds": c.seconds,
      "memory": memory | {"chip": c.topology.chip.hbm, "kinds": by("kind", self.tensors)},
    }
    if not c.text:
      arrays = [dataclasses.asdict(array) for array in largest(self.experiment, c.topology)]
      fits = changes(self.experiment, c.topology, c)
      return found | {
        "problem": c.problem,
        "needs": wanted(c),
        "arrays": arrays,
        "changes": [dataclasses.asdict(change) for change in fits],
      }
    return found | {
      "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors[:TOLD]],
      "step_seconds": self.cost.step,
      "parts": self.cost.seconds,
      "uncounted_seconds": self.cost.uncounted,
      "flops": {"model": self.flops, "executed": self.cost.flops},
      "mfu": self.mfu,
      "tokens_per_second": self.tokens_per_second,
      "hours": self.hours,
      "chip_hours": self.hours * c.topology.chips,
      "dollars": self.price and self.price * self.hours * c.topology.chips,
      "collectives": [dataclasses.asdict(found) for found in self.collectives()],
    }


def show(plan: Plan, console) -> None:
  """Prints the tables."""
  c = plan.compiled
  axes = ", ".join(f"{axis}={n}" for axis, n in c.network.axes.items() if n > 1) or "one device"
  n, name = c.topology.chips, c.topology.name
  slices = f"{c.topology.slices} slices of " if c.topology.slices > 1 else ""
  console.print(f"{slices}{name}, {n} chips; mesh {axes}; compiled in {c.seconds:.0f} s")
  console.print(_memory(plan))
  console.print(_tensors(plan))
  console.print(_time(plan))
  console.print(_collectives(plan))
  rate = "tokens" if plan.experiment.data.row_length() else "examples"
  lines = [
    f"MFU {plan.mfu:.1%}: {human(plan.flops)} model FLOPs a step and chip, by formula; "
    f"{human(plan.cost.flops)} in products that are executed",
    f"{human(plan.tokens_per_second)} {rate} a second, {human(plan.tokens_per_second / n)} a chip",
  ]
  if plan.experiment.steps:
    dollars = "" if plan.price is None else f", ${plan.price * plan.hours * n:,.0f}"
    time = f"{duration(plan.hours * 3600)}, {plan.hours * n:,.0f} chip-hours{dollars}"
    lines.append(f"{plan.experiment.steps} steps: {time}")
  for line in lines:
    console.print(line, highlight=False)


def _table(title: str, *columns: str):
  from rich import box
  from rich.table import Table

  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  for i, column in enumerate(columns):
    table.add_column(column, justify="left" if i == 0 or column == "" else "right")
  return table


def _memory(plan: Plan):
  memory, chip = plan.compiled.memory, plan.compiled.topology.chip
  table = _table("Memory of each chip at the peak", "", "GiB", "most of it")
  for kind in KINDS:
    found = [t for t in plan.tensors if t.kind == kind]
    if size := sum(t.bytes for t in found):
      most, bytes_ = next(iter(by("where", found).items()))
      table.add_row(kind, f"{size / GiB:.2f}", f"{most} {bytes_ / GiB:.2f}")
  found = sum(t.bytes for t in plan.tensors)
  table.add_row("code", f"{memory['generated_code'] / GiB:.2f}", "")
  table.add_row("sum", f"{found / GiB:.2f}", "of the buffers that are found here")
  table.add_row("peak", f"{memory['peak'] / GiB:.2f}", "by the compiler's own account")
  left = chip.hbm - memory["peak"]
  table.add_row("left", f"{left / GiB:.2f}", f"of the chip's {chip.hbm / GiB:.2f}")
  if host := memory["host_argument"] + memory["host_temp"]:
    table.add_row("host", f"{host / GiB:.2f}", "in the memory of the host, for each chip")
  return table


def _tensors(plan: Plan):
  table = _table("Largest tensors at the peak", "tensor", "GiB", "kind", "of")
  for t in plan.tensors[:SHOWN]:
    table.add_row(t.shape, f"{t.bytes / GiB:.3f}", t.kind, t.where)
  return table


def _time(plan: Plan):
  step = plan.cost.step
  counted = bool(plan.compiled.topology.chip.clock)
  of, about = ("", ABOUT) if counted else (", a roofline: there are no cycles", ROOFLINE)
  table = _table(f"Predicted time of a step{of}", "", "seconds", "share", "")
  for part in PARTS:
    seconds = plan.cost.seconds[part]
    table.add_row(part, f"{seconds:.4f}", f"{seconds / step:.0%}", about[part])
  table.add_row("step", f"{step:.4f}", "", "")
  table.add_row("uncounted", f"{plan.cost.uncounted:.4f}", "", "of it, without the compiler's word")
  return table


def _collectives(plan: Plan):
  columns = ("what", "over", "MB each", "times", "seconds", "exposed", "where")
  table = _table("Collectives, and copies to and from the host", *columns)
  found = plan.collectives()
  for c in found[:SHOWN]:
    kind = f"{c.kind}{', async' if c.asynchronous else ''}"
    row = (kind, "+".join(c.axes), f"{c.bytes / 1e6:.1f}", str(c.times), f"{c.seconds:.4f}")
    table.add_row(*row, f"{c.exposed:.4f}", _where(c.scope))
  rest = found[SHOWN:]
  if rest:
    sums = sum(c.seconds for c in rest), sum(c.exposed for c in rest)
    table.add_row(f"{len(rest)} more", "", "", "", f"{sums[0]:.4f}", f"{sums[1]:.4f}", "")
  return table


def _problem(plan: dict[str, Any]) -> str:
  said = plan.get("problem", "")
  return "does not fit" if OUT_OF_MEMORY in said else said[:60]


def _where(scope: str) -> str:
  """The part of the model and the pass; nothing where the compiler joined several."""
  marks = {"rematted": "again", "transpose(": "backward", "jvp": "forward"}
  turn = next((turn for mark, turn in marks.items() if mark in scope), "")
  return f"{place(scope)} {turn}".strip() or ("step" if scope else "several, joined")


def explain(plan: Plan, console) -> None:
  """Prints why a step does not fit, and what would."""
  c, e = plan.compiled, plan.experiment
  needs, there = wanted(c), c.topology.chip.hbm
  if needs is None:
    console.print(c.problem)
  else:
    console.print(
      f"does not fit {c.topology.name}: a chip needs {needs / GiB:.1f} GiB and has "
      f"{there / GiB:.2f}; parameters and optimizer state are "
      f"{c.state_bytes / GiB:.2f} of it"
    )
  columns = ("array", "GiB each", "of", "made by")
  table = _table("Largest arrays of the step on a chip, before the compiler fuses any", *columns)
  for t in largest(e, c.topology):
    table.add_row(t.shape, f"{t.bytes / GiB:.2f}", t.where, ", ".join(t.made_by[:4]))
  console.print(table)
  table = _table("Small changes that should fit, by closed form", "", "GiB", "step takes")
  for change in changes(e, c.topology, c):
    table.add_row(change.line(), f"{change.memory / GiB:.1f}", f"{change.slower:.2f} x")
  if table.row_count:
    console.print(table)
  else:
    whole = c.state_bytes >= there
    more = "" if whole else ", or let --search combine several"
    console.print(f"no small change fits: take more chips{more}")


def show_search(found: Found, asked: list[Candidate], console) -> None:
  """Prints what a search looked at, what it compiled, and the best of it."""
  n = len(found.candidates)
  for why, count in found.dropped.items():
    console.print(f"{count} dropped: {why}", highlight=False)
  console.print(
    f"{n} left, of which {len(asked)} were compiled: in closed form the fastest of each mesh, "
    "remat policy and batch, before others like them",
    highlight=False,
  )
  columns = ("settings", "seconds", "GiB", "closed form", "of which")
  table = _table("Compiled, the best first", *columns)
  for c in asked:
    plan = c.plan or {}
    took = f"{plan['step_seconds']:.4f}" if "step_seconds" in plan else _problem(plan)
    peak = f"{plan['memory']['peak'] / GiB:.2f}" if "peak" in plan.get("memory", {}) else ""
    table.add_row(c.line(), took, peak, f"{c.guess.seconds:.4f}", c.guess.why())
  console.print(table)
  if asked[0].fits:
    console.print(f"best:\n{asked[0].line()}", soft_wrap=True, highlight=False)
  else:
    console.print("none of these fits: raise --few, or take more chips")
