"""A run goes on with other devices than it began on: what it computes stays, how changes.

Fewer devices make fewer shards of the batch, so each has more rows; more microbatches make up for
that, so that no device holds more rows at once than it did. The global batch, and with it the
losses, stay the same to rounding. Parameters and the optimizer's state are shared out among fewer
devices: whether these hold them is not known here.

`tensor`, `context`, `expert` and `pipeline` stay as they are: they are there because the model does
not fit without them, and it is divided by them in ways of its own. What a microbatch decides by
itself, and not row by row, is of smaller microbatches then: running means of a norm, the balance
loss and the room of experts, the partners of mixup.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from bigtrain import console, processes
from bigtrain.config import Refused
from bigtrain.experiment import Experiment
from bigtrain.mesh import AXES, OTHER_NAMES, Mesh
from bigtrain.sharding import ACTIVATION
from bigtrain.validate import check_mesh, validate

FREE = ("slices", "data", "fsdp")  # Axes that may change.


def begun_on(experiment: Experiment, events: Iterable[dict[str, Any]]) -> int | None:
  """The devices that a run began on, by its first start; None if it has not begun."""
  first = next((e.get("devices") for e in events if e["event"] == "start"), None)
  fixed = [size for axis in AXES if (size := _size(experiment.mesh, axis)) != 1]
  return first if first is None or -1 in fixed else math.prod(fixed)


def fitted(experiment: Experiment, events: Iterable[dict[str, Any]]) -> Experiment:
  """The experiment on the devices that are attached, if the run that wrote these events has begun.

  Raises:
    Refused: it cannot be laid over them.
  """
  validate(experiment)  # So that what is wrong besides is said as ever.
  here = jax.devices()
  if (meant := begun_on(experiment, events)) is None or meant == len(here):
    return experiment
  slices = {getattr(device, "slice_index", None) for device in here}
  found = fit(experiment, len(here), meant, len(slices) if len(slices) > 1 else None)
  if processes.is_first():
    axes = " ".join(f"{a}={n}" for a, n in found.mesh.shape(len(here)).items() if n > 1)
    console.say(
      f"{len(here)} devices instead of {meant}: {axes or 'no mesh'}, microbatches "
      f"{found.microbatches}; the batch stays {found.batch}"
    )
  return found


def fit(experiment: Experiment, devices: int, meant: int, slices: int | None = None) -> Experiment:
  """The experiment on the mesh of `devices` that comes nearest to its own on `meant` devices.

  Args:
    experiment: what runs; it stays as it is.
    devices: how many are here.
    meant: how many it began on.
    slices: of the hardware, where that has some.

  Raises:
    Refused: no mesh of so many devices will do; the reason is that of the one that comes nearest.
  """
  if devices == meant:
    return experiment
  shape = experiment.mesh.shape(meant)
  kept = math.prod(size for axis, size in shape.items() if axis not in FREE)
  if devices % kept:
    axes = ", ".join(f"{a}={n}" for a, n in shape.items() if n > 1 and a not in FREE)
    raise Refused(
      f"the run began on {meant} devices and {devices} are here: {axes} take a multiple of {kept}; "
      f"give it {devices // kept * kept or kept}"
    )
  refused = None
  for sizes in _meshes(shape, devices // kept, slices):
    found = dataclasses.replace(
      experiment, mesh=dataclasses.replace(experiment.mesh, **sizes), microbatches=1
    )
    try:
      found.microbatches = _microbatches(experiment, shape, found.mesh.shape(devices))
      check_mesh(found, devices)
      return found
    except Refused as error:
      refused = refused or error
  raise Refused(
    f"the run began on {meant} devices and {devices} are here, of which no mesh will do: {refused}"
  ) from refused


def _meshes(shape: dict[str, int], devices: int, slices: int | None) -> Iterator[dict[str, int]]:
  """The sizes of the axes that may change, on so many devices; the likest mesh first.

  As many shards of the parameters as there were; else more, which hold no more; else fewer.
  """
  if slices is None:
    slices = math.gcd(shape["slices"], devices)
  if devices % slices:
    raise Refused(f"the {slices} slices have no equal numbers of devices")
  each, before = devices // slices, shape["fsdp"]
  by_likeness = lambda fsdp: (fsdp < before, abs(fsdp - before))
  for fsdp in sorted((n for n in range(1, each + 1) if each % n == 0), key=by_likeness):
    yield {"slices": slices, "data": each // fsdp, "fsdp": fsdp}


def _microbatches(experiment: Experiment, before: dict[str, int], after: dict[str, int]) -> int:
  """The fewest with which no device holds more rows at once than on the mesh before."""
  batches = [experiment.batch, *(batch for _, batch in experiment.batch_stages)]
  shards, now = _batch_shards(before), _batch_shards(after)
  least = max(experiment.microbatches, -(-experiment.microbatches * shards // now))
  for n in range(least, min(batches) // now + 1):
    if all(batch % (n * now) == 0 for batch in batches):
      return n
  raise Refused(
    f"{now} shards of the batch and {least} microbatches or more do not divide a batch of "
    f"{', '.join(map(str, batches))}"
  )


def _batch_shards(shape: dict[str, int]) -> int:
  return math.prod(shape[axis] for axis in ACTIVATION["B"])


def _size(mesh: Mesh, axis: str) -> int:
  return 1 if axis in OTHER_NAMES else getattr(mesh, axis)
