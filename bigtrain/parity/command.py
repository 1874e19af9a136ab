"""`bigtrain parity EXPERIMENT`."""

import inspect
import json
import os
from typing import TYPE_CHECKING

from bigtrain.annotations import check_types
from bigtrain.cli import target
from bigtrain.config import Refused, config
from bigtrain.exit_codes import Exit
from bigtrain.flags import parse

if TYPE_CHECKING:
  import jax

  from bigtrain.mesh import Mesh


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
  from bigtrain.parity import Reference, compare, shrink
  from bigtrain.parity.shrink import small_mesh
  from bigtrain.program import enable_compilation_cache

  mesh = virtual(small_mesh(experiment.mesh))  # First: what checks a mesh makes jax begin.
  small = shrink(experiment)
  enable_compilation_cache()
  report = compare(small, Reference(small), mesh)
  if chosen.json:
    print(json.dumps(report.json(), indent=2))
  else:
    report.print(chosen.rows)
  return Exit.DONE if report.equal else Exit.CHECK


def virtual(mesh: "Mesh") -> "jax.sharding.Mesh":
  """The mesh over devices on this machine's CPU, whatever else is attached.

  Raises:
    Refused: jax has begun already, with fewer.
  """
  import jax

  from bigtrain.parity.shrink import size

  count = size(mesh)
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:  # It has begun.
    pass
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise Refused(
      f"parity wants {count} virtual devices, but the experiment file made jax begin with "
      f"{len(devices)} while it was read; move what computes there into functions, or set "
      f"JAX_NUM_CPU_DEVICES={count}"
    )
  return mesh.make(devices[:count])
