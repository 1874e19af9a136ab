"""A copy of an experiment that a laptop compares in seconds: the same structure on the same axes.

Blocks, patterns, norms, positions, losses, microbatches and the optimizer stay; widths, lengths,
the vocabulary and the repeats of the pattern become small. Everything is in float32, also what the
experiment has in fewer bits: a number that lies between two others in eight bits, and differs in
its last bit, may be rounded either way. Dropout is on: where each device drew its own bits, or all
the same, only that would show it.
"""

import copy
import dataclasses
import math
from typing import Any

from bigtrain.config import Refused, configs
from bigtrain.experiment import Experiment
from bigtrain.hints import to_set
from bigtrain.mesh import AXES, OTHER_NAMES, Mesh
from bigtrain.models.moe import BalanceLoss, MoEConfig
from bigtrain.models.transformer import TransformerConfig
from bigtrain.optim.optimizer import Optimizer
from bigtrain.optim.schedule import Schedule
from bigtrain.optim.soap import SOAP
from bigtrain.parallel.expert import Capacity
from bigtrain.parity.synthetic import made_up
from bigtrain.sharding import ACTIVATION
from bigtrain.smoke import LENGTHS, capped
from bigtrain.validate import check_mesh, validate

FIELDS = tuple(axis for axis in AXES if axis not in OTHER_NAMES)  # Of Mesh.
STEPS = 5
ROWS = 2  # Of a microbatch on each device.
DROPOUT = 0.1  # Where the experiment has none.
LENGTH = 32  # Tokens of a row, which four context shards cut into two halves each.
CAPS = {
  **dict.fromkeys(LENGTHS, LENGTH),
  "dim": 32,
  "hidden": 64,
  "heads": 8,
  "kv_heads": 4,
  "head_dim": 8,
  "q_rank": 32,
  "kv_rank": 16,
  "rotary_dim": 4,
  "value_dim": 8,
  "experts": 8,
  "top_k": 2,
  "shared": 64,
  "groups": 4,
  "kept": 2,
  "window": 4,
  "vocab": 128,
  "loss_chunk": 24,  # Tokens: a device has more, and not a multiple.
}
# A matrix has no gradient in as many directions as its sides differ by. SOAP divides what is there,
# which is rounding, by its own size and `eps`: at 1e-8 such updates are rounding alone.
SOAP_EPS = 1e-5
LAYERS = 4  # Of a model that is no TransformerConfig.
# Two devices are each other's next and previous ones: a third shows the direction of a ring.
RINGS = ("context", "pipeline", "expert")
DEVICES = 8  # Rings grow to four as long as there are no more than these.


def shrink(experiment: Experiment) -> Experiment:
  """The small copy, on a mesh whose axes have two devices (rings four) where they had more.

  Raises:
    Refused: the mesh is a single device or does not fit the experiment, or there is no small copy.
  """
  check_mesh(experiment, size(experiment.mesh))
  e = copy.deepcopy(experiment)
  e.mesh = small_mesh(e.mesh)
  if (devices := size(e.mesh)) == 1:
    raise Refused(
      "parity compares a mesh with one device, and this mesh is one device; give it another axis, "
      f"as in {to_set('mesh.fsdp', 2)}"
    )
  for _, node in configs(e.model):
    _few_layers(node, e.mesh.pipeline)
  e.model, e.objective = capped(e.model, CAPS).smoke(), capped(e.objective, CAPS)
  for _, node in configs(e.model):
    if hasattr(node, "dtype"):
      node.dtype = "float32"
    if isinstance(node, BalanceLoss) and e.mesh.pipeline > 1:
      node.over = "row"  # Over a batch it is another number: that of each microbatch in the stages.
    if isinstance(node, MoEConfig):
      _make_room(node, e.mesh)
  lengths = {name: LENGTH for name in LENGTHS}
  e.data = made_up(capped(e.data, lengths).smoke(), e.model)
  e.products, e.weights = None, "float32"
  for _, node in configs(e.optimizer):
    if isinstance(node, Optimizer):
      node.moments = "float32"
    elif isinstance(node, Schedule):
      node.warmup = min(node.warmup, 2)
    if isinstance(node, SOAP):
      node.eps = max(node.eps, SOAP_EPS)
  shape = e.mesh.shape(devices)
  e.steps, e.epochs, e.microbatches = STEPS, None, min(e.microbatches, 2)
  e.batch = ROWS * e.microbatches * math.prod(shape[axis] for axis in ACTIVATION["B"])
  e.batch_stages, e.evaluation.batch = (), e.batch
  e.weights_from, e.new_weights = None, ()
  validate(e, devices)
  _drop(e, devices)
  return e


def size(mesh: Mesh) -> int:
  """Devices of a mesh; an axis that takes what is left counts as one."""
  return math.prod(max(getattr(mesh, axis), 1) for axis in FIELDS)


def small_mesh(mesh: Mesh) -> Mesh:
  """The same axes with two devices each, rings with four where there is room."""
  sizes = {axis: getattr(mesh, axis) for axis in FIELDS}
  small = {axis: 2 if n == -1 else min(n, 2) for axis, n in sizes.items()}
  for axis in RINGS:
    if sizes[axis] >= 4 and 2 * math.prod(small.values()) <= DEVICES:
      small[axis] = 4
  return dataclasses.replace(mesh, **small)


def _few_layers(node: Any, stages: int) -> None:
  """Two repeats of a stack's pattern, two for each stage of a pipeline, besides what is no repeat.

  With one repeat the loop over layers would be none.
  """
  if isinstance(node, TransformerConfig):
    for name in ("layers", "decoder_layers"):
      if (layers := getattr(node, name, None)) is not None:
        repeats, rest = divmod(layers - len(node.first), len(node.pattern))
        repeats = min(repeats, 2 * stages)
        setattr(node, name, len(node.first) + repeats * len(node.pattern) + rest)
  elif isinstance(layers := getattr(node, "layers", None), int):
    node.layers = min(layers, LAYERS)


def _make_room(c: MoEConfig, mesh: Mesh) -> None:
  """Gives experts room for all, on the way they have: who finds none is for each mesh another.

  `Capacity`, which has slots for each row, fills them alike on meshes that do not cut rows.
  """
  if isinstance(c.dispatch, Capacity):
    if mesh.context > 1:
      c.dispatch.factor = max(c.dispatch.factor, c.experts / c.top_k)
  elif c.dispatch.buffer is not None:
    c.dispatch.buffer = float(mesh.expert)


def _drop(e: Experiment, devices: int) -> None:
  """Sets the rates of dropout that are 0, where the experiment can have it."""
  for _, node in configs(e.model):
    for name in ("dropout", "drop_path"):
      if getattr(node, name, None) == 0.0:
        setattr(node, name, DROPOUT)
        try:
          validate(e, devices)
        except Refused:  # As by a kernel that has none.
          setattr(node, name, 0.0)
