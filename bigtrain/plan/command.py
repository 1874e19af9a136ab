"""`bigtrain plan EXPERIMENT --topology NAME`."""

import json
import pathlib
import sys

from bigtrain.config import Refused, config
from bigtrain.exit_codes import Exit
from bigtrain.flags import parse


@config
class PlanFlags:
  """What is planned for, and how it is told."""

  topology: str | None = None  # Chips and their grid: v5e:4x4, v5p:2x2x4, v6e:8x8, h100:8.
  slices: int = 1  # Such slices, joined by the data center's network.
  json: bool = False  # Print one object: bytes, seconds, FLOPs.
  hlo: str | None = None  # A directory for the optimized program's text.
  price: float | None = None  # Dollars an hour of one chip.


ABOUT = """Compiles the real training step with the chip's own compiler, without the chip, and says
what memory it takes and how long it should take."""


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
  from rich.console import Console

  from bigtrain.plan.compile import planned
  from bigtrain.plan.report import Plan, show

  compiled = planned(experiment, topology)
  if flags.hlo is not None:
    folder = pathlib.Path(flags.hlo)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.hlo.txt").write_text(compiled.text)
  if not compiled.text:
    print(compiled.problem, file=sys.stderr)
    return Exit.FAILED
  plan = Plan.of(experiment, compiled, flags.price)
  if flags.json:
    print(json.dumps(plan.json(), indent=2))
  else:
    show(plan, Console())
  return None
