"""`bigtrain plan EXPERIMENT --topology NAME`."""

import json
import pathlib
from typing import TYPE_CHECKING

from bigtrain.config import Refused, config
from bigtrain.console import say, tables
from bigtrain.exit_codes import Exit
from bigtrain.flags import parse

if TYPE_CHECKING:
  from bigtrain.experiment import Experiment
  from bigtrain.plan.topologies import Topology


@config
class PlanFlags:
  """What is planned for, and how it is told."""

  topology: str | None = None  # Chips and their grid: v5e:4x4, v5p:2x2x4, v6e:8x8, h100:8.
  slices: int = 1  # Such slices, joined by the data center's network.
  search: bool = False  # Look for the fastest mesh, remat policy and number of microbatches.
  batches: tuple[int, ...] = ()  # Global batches that a search tries; the experiment's own if none.
  few: int = 4  # Candidates of a search that are compiled.
  workers: int = 2  # Processes that compile at a time.
  json: bool = False  # Print one object: bytes, seconds, FLOPs.
  hlo: str | None = None  # A directory for the optimized program's text.
  price: float | None = None  # Dollars an hour of one chip.


OF_SEARCH = ("search", "batches", "few", "workers", "json", "hlo")

ABOUT = """Compiles the real training step with the chip's own compiler, without the chip, and says
what memory it takes and how long it should take. Memory is the compiler's account. Time is its own
estimate of every instruction, with loops counted, and a stated model for what has none: Pallas
kernels, gathers, links. It misses input, evaluation and saving, stalls and failures, links that
collectives share, and latencies, which small steps are made of. No chip was timed against it yet:
use it to compare layouts, and see docs/plan.md for published steps to hold it against."""


def command(arguments: list[str]) -> int | None:
  """bigtrain plan EXPERIMENT --topology NAME [flags] [overrides]."""
  from bigtrain.plan import topologies

  topologies.prepare()  # Before anything imports jax.
  if not arguments or arguments[0] in ("-h", "--help"):
    parse([PlanFlags()], arguments or ["--help"], "bigtrain plan EXPERIMENT", ABOUT)
    return Exit.DONE
  target, *rest = arguments
  if target.startswith("-"):
    raise Refused(
      "bigtrain plan takes EXPERIMENT first: bigtrain plan experiments/llama3.py --topology v5e:4x4"
    )
  from bigtrain.annotations import check_types
  from bigtrain.load import load

  experiment, _ = load(target)
  check_types(experiment)
  flags, experiment = parse([PlanFlags(), experiment], rest, f"bigtrain plan {target}", ABOUT)
  if flags.topology is None:
    raise Refused(f"bigtrain plan {target} needs --topology, as in --topology v5p:2x2x4")
  topology = topologies.topology(flags.topology, flags.slices)
  if flags.search:
    return _search(target, rest, experiment, topology, flags)
  return _plan(experiment, topology, flags)


def _plan(experiment: "Experiment", topology: "Topology", flags: PlanFlags) -> int | None:
  """One plan. Fails where it does not fit."""
  from bigtrain.plan.compile import planned
  from bigtrain.plan.report import Plan, explain, show
  from bigtrain.validate import remarks

  compiled = planned(experiment, topology)
  if flags.hlo is not None:
    folder = pathlib.Path(flags.hlo)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.hlo.txt").write_text(compiled.text)
  for remark in remarks(experiment, topology.chips):
    say(remark)
  plan = Plan.of(experiment, compiled, flags.price)
  if flags.json:
    print(json.dumps(plan.json(), indent=2))
  elif compiled.text:
    show(plan, tables())
  else:
    explain(plan, tables())
  return None if compiled.text else Exit.CHECK


def _search(
  target: str, arguments: list[str], e: "Experiment", topology: "Topology", flags: PlanFlags
) -> int | None:
  """The ranked table of a search, and the line to paste."""
  from bigtrain.plan import search
  from bigtrain.plan.report import show_search

  found = search.prune(e, topology, flags.batches)
  compile = search.by_process(target, _without(arguments, OF_SEARCH))
  asked = search.search(found, flags.few, flags.workers, compile)
  if flags.json:
    print(json.dumps([{"settings": c.settings, "plan": c.plan} for c in asked], indent=2))
  else:
    show_search(found, asked, tables())
  return None if asked[0].fits else Exit.CHECK


def _without(arguments: list[str], names: tuple[str, ...]) -> list[str]:
  """The arguments without those flags and their values."""
  left, skips = [], False
  for word in arguments:
    if word.startswith("--"):
      name = word[2:].partition("=")[0].replace("-", "_")
      skips = name.removeprefix("no_") in names
    if not skips:
      left.append(word)
  return left
