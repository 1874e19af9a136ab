"""`bigtrain parity EXPERIMENT`."""

import inspect
import json
import os
from typing import Literal

from bigtrain.annotations import check_types
from bigtrain.cli import target
from bigtrain.config import config
from bigtrain.exit_codes import Exit
from bigtrain.flags import parse


@config
class Parity:
  """Whether the experiment's mesh computes what one device computes: exit code 0, or 4 if not.

  A small copy of the experiment (the same blocks, losses and optimizer; narrow, short and in
  float32) makes five steps on the same mesh axes, two devices each, and on one device. Every
  gradient and every update is compared by name; the table has the worst first, and the first layer
  that differs is named. Devices are virtual ones on this machine's CPU: no accelerator, no data and
  no weights are touched, and a minute is usually enough. Sizes, batch and steps are the gate's own;
  all other fields are the experiment's, as in --mesh.fsdp 64 --mesh.tensor 8.
  """

  json: bool = False  # Print an object with all tensors instead of the table.
  rows: int = 20  # Of the table.
  # That share the devices as hosts do: with 2, neighbours along every axis are not of one process.
  processes: Literal[1, 2] = 1


def parity(arguments: list[str]) -> int:
  """bigtrain parity EXPERIMENT [flags] [overrides]."""
  about = inspect.getdoc(Parity) or ""
  file = target(arguments, "parity", "EXPERIMENT", "experiments/quickstart.py --mesh.fsdp 8")
  if file is None:
    parse([Parity()], arguments, "bigtrain parity EXPERIMENT", about)
    return Exit.DONE
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # No compiler's advice on speed, as to Muon.
  from bigtrain.load import load

  experiment, _ = load(file)
  check_types(experiment)
  chosen, experiment = parse(
    [Parity(), experiment], arguments[1:], f"bigtrain parity {file}", about
  )
  from bigtrain.parity import Reference, compare, shrink, virtual
  from bigtrain.parity.shrink import small_mesh
  from bigtrain.program import enable_compilation_cache

  with virtual.joined(chosen.processes, arguments):
    # First: what checks a mesh makes jax begin.
    mesh = virtual.over_devices(small_mesh(experiment.mesh), chosen.processes)
    small = shrink(experiment)
    enable_compilation_cache()
    report = compare(small, Reference(small), mesh)
  if chosen.json:
    print(json.dumps(report.json(), indent=2))
  else:
    report.print(chosen.rows)
  return Exit.DONE if report.equal else Exit.CHECK
