"""Validation of a whole experiment before any device work.

What concerns one object is that object's own `check`; here is what concerns several.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from bigtrain.annotations import check_types
from bigtrain.config import Refused, configs
from bigtrain.data.sources import check_apart
from bigtrain.experiment import Experiment
from bigtrain.hints import to_set
from bigtrain.mesh import AXES, OTHER_NAMES, USUAL
from bigtrain.optim.optimizer import Optimizer
from bigtrain.optim.schedule import Schedule
from bigtrain.parallel.expert import Dropless
from bigtrain.products import Delayed
from bigtrain.sharding import ACTIVATION, CONTEXT, EXCHANGED, WEIGHT

LEAST = {
  "batch": 1,
  "microbatches": 1,
  "seed": 0,
  "evaluation.every": 0,
  "evaluation.batch": 1,
  "evaluation.sample_tokens": 1,
  "evaluation.temperature": 0,
  "checkpoints.every": 0,
  "checkpoints.keep": 1,
  "checkpoints.keep_every": 1,
  "checkpoints.within": 1,
  "checkpoints.verify": 0,
  "faults.window": 8,
  "faults.patience": 1,
  "faults.back": 0,
  "faults.recovery": 1,
  "faults.examine": 0,
  "logging.every": 1,
  "logging.layers_every": 0,
}
VOCABULARY_MULTIPLE = 128  # A vocabulary may be padded to this, the tile of a TPU's matrix unit.


def validate(experiment: Experiment, devices: int | None = None, *, data: bool = True) -> None:
  """Refuses an experiment that cannot run.

  Args:
    experiment: what is checked.
    devices: how many are attached, to check the mesh against; None checks everything else.
    data: whether it is here; if not, what only its files can tell is not checked.

  Raises:
    Refused: a line for each problem: the cause, the nearest right value, and what to change.
  """
  check_types(experiment)
  nodes = [found for found in configs(experiment) if data or found[0].split(".")[0] != "data"]
  _all(
    functools.partial(_check_length, experiment),
    *(functools.partial(_check_least, experiment, *least) for least in LEAST.items()),
    *(functools.partial(_check_node, *node) for node in nodes),
    functools.partial(_check_stages, experiment),
    functools.partial(_check_new_weights, experiment),
  )
  apart = lambda experiment: check_apart(experiment.data)
  checks = (
    _check_microbatches,
    *((_check_vocabulary,) if data else ()),
    _check_rows,
    _check_token_types,
    *((apart, _check_classes, _check_inputs) if data else ()),
    _check_width,
    _check_lower_rate,
  )
  _all(
    *(functools.partial(check, experiment) for check in checks),
    functools.partial(experiment.model.check_objective, experiment.objective),
    functools.partial(check_mesh, experiment, devices) if devices is not None else lambda: None,
  )


def check_mesh(experiment: Experiment, devices: int) -> None:
  """Refuses a mesh that these devices do not make, or that does not divide what it shards."""
  shape = experiment.mesh.shape(devices)
  _all(
    functools.partial(_check_batches, experiment, shape),
    functools.partial(_check_dims, experiment, shape),
    functools.partial(_check_cuts, experiment, shape),
    functools.partial(_check_pipeline, experiment, shape),
  )


def remarks(experiment: Experiment, devices: int | None = None) -> Iterator[str]:
  """What can run but is hardly meant, a line each; `devices` are those attached unless given."""
  shape = experiment.mesh.shape(devices or jax.device_count())
  for path, node in configs(experiment):
    if isinstance(node, Dropless) and node.buffer is None and (n := shape["expert"]) > 2:
      yield (
        f"{path}: each of {n} devices has room for {n} times the tokens that it sends to experts, "
        f"which are moved and sorted whether or not they come; {to_set(f'{path}.buffer', 1.5)} "
        "bounds that, and what does not fit is counted"
      )
    if isinstance(node, Schedule) and node.warmup > (experiment.steps or math.inf):
      yield (
        f"{path}.warmup is {node.warmup} steps but the run has {experiment.steps}: it never reaches"
        f" its learning rate; set {to_set(f'{path}.warmup', max(experiment.steps // 10, 1))}, or "
        "more steps"
      )
  if shape["pipeline"] > 1:
    for path, node in _pipelined(experiment):
      plan = node.pipeline.schedule(shape["pipeline"], _rows(experiment.batch, experiment, shape))
      yield (
        f"{path}.pipeline: each of {plan.stages} stages waits {plan.bubble():.0%} of its time, "
        f"with {plan.microbatches} microbatches in flight and rounds={plan.rounds}"
      )


def _all(*checks: Callable[[], None]) -> None:
  """Makes every check; what several of them refuse is refused together, a line each."""
  problems = []
  for check in checks:
    try:
      check()
    except Refused as error:
      problems.append(str(error))
  if problems:
    raise Refused("\n".join(problems))


def _check_least(e: Experiment, path: str, least: int) -> None:
  value = _get(e, path)
  if value is not None and value < least:
    raise Refused(f"{path} must be at least {least}, not {value}")


def _check_node(path: str, node: Any) -> None:
  if hasattr(node, "check"):
    try:
      node.check()
    except Refused as error:
      named = str(error).startswith(path.split(".")[0])
      raise error if named else Refused(f"{path}: {error}") from error


def _get(node: Any, path: str) -> Any:
  for name in path.split("."):
    node = getattr(node, name)
  return node


def _check_length(e: Experiment) -> None:
  if e.epochs is None:
    if e.steps < 1:
      given = f", not {e.steps}" * bool(e.steps)
      raise Refused(f"steps must be at least 1{given}, or epochs given in their place")
  elif e.steps:
    raise Refused(
      f"steps {e.steps} and epochs {e.epochs} are both given; set {to_set('epochs', None)}"
    )
  elif e.epochs <= 0:
    raise Refused(f"epochs must be above 0, not {e.epochs}")
  elif e.batch_stages:
    raise Refused("epochs cannot be counted with batch_stages; give the run's length in steps")


def _check_stages(e: Experiment) -> None:
  starts = [step for step, _ in e.batch_stages]
  if any(a >= b for a, b in itertools.pairwise([0, *starts])):
    raise Refused(f"batch_stages start at steps {starts}; they must be positive and rise")
  if any(batch < 1 for _, batch in e.batch_stages):
    raise Refused("batch_stages: every batch must be at least 1")
  bounds = itertools.pairwise([0, *(min(step, e.steps) for step in starts), e.steps])
  batches = [e.batch, *(batch for _, batch in e.batch_stages)]
  examples = sum((end - start) * n for (start, end), n in zip(bounds, batches, strict=True))
  if examples >= 2**32:  # The data position is uint32 on the device.
    raise Refused(
      f"{e.steps} steps take {examples} examples; the data position holds 2**32 - 1: take longer "
      f"rows and a smaller batch"
    )


def _check_new_weights(e: Experiment) -> None:
  if e.new_weights and e.weights_from is None:
    raise Refused("new_weights are parts of a model whose others come from weights_from; set that")


def _check_vocabulary(e: Experiment) -> None:
  known, needed = e.model.vocabulary(), e.data.vocabulary()
  if known is None or needed is None:
    return
  most = padded(needed)
  if not needed <= known <= most:
    also = f" (or up to {most}, the next multiple of 128)" if most != needed else ""
    field = next((name for name, (letter, _) in e.model.dims().items() if letter == "V"), "vocab")
    raise Refused(
      f"model.{field} is {known} but the tokenizer has {needed} tokens; "
      f"set {to_set(f'model.{field}', needed)}{also}"
    )


def padded(vocabulary: int) -> int:
  """The largest vocabulary of a model for a tokenizer with so many tokens."""
  return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _check_rows(e: Experiment) -> None:
  longest, length = e.model.longest_row(), e.data.row_length()
  if longest is not None and length is not None and length > longest:
    raise Refused(
      f"the data's rows have {length} tokens but the model {longest} positions; "
      f"give the model {length}, or the data rows of {longest}"
    )


def _check_token_types(e: Experiment) -> None:
  known, needed = e.model.n_token_types(), e.data.n_token_types()
  if known is not None and needed is not None and known < needed:
    raise Refused(
      f"the data tells {needed} texts of a row apart but the model {known}; set the encoder's "
      f"token_types to {needed}"
    )


def _check_classes(e: Experiment) -> None:
  needed, shape = e.data.n_classes(), e.data.input_shape()
  known = e.model.n_classes() if needed is None or shape is None else e.model.classes_of(shape)
  if known is not None and needed is not None and known != needed:
    raise Refused(
      f"model.classes is {known} but the data has {needed} classes; set "
      f"{to_set('model.classes', needed)}, or correct the data's source"
      if hasattr(e.model, "classes")
      else f"the model gives {known} scores but the data has {needed} classes; make its last layer "
      f"{needed} wide, or correct the data's source"
    )


def _check_inputs(e: Experiment) -> None:
  if (shape := e.data.input_shape()) is not None:
    e.model.check_inputs(shape)


def _check_width(e: Experiment) -> None:
  if (width := e.model.width()) is not None:
    e.optimizer.make(max(e.steps, 1), width)


def _check_lower_rate(e: Experiment) -> None:
  if e.faults.policy == "lower_rate" and not isinstance(e.optimizer, Optimizer):
    raise Refused(
      f"faults.policy is lower_rate, but the learning rate of {type(e.optimizer).__name__} is its "
      "own: derive it from bigtrain.optim.optimizer.Optimizer, or take another policy"
    )


def _batches(e: Experiment) -> list[tuple[str, int]]:
  """Every batch that is trained on, with its path."""
  return [
    ("batch", e.batch),
    *((f"batch_stages.{i}.1", n) for i, (_, n) in enumerate(e.batch_stages)),
  ]


def _check_microbatches(e: Experiment) -> None:
  for path, batch in _batches(e):
    if batch % e.microbatches:
      near = _multiples_near(batch, e.microbatches)
      raise Refused(f"{path} {batch} is not divisible by {e.microbatches} microbatches; use {near}")


def _check_batches(e: Experiment, shape: dict[str, int]) -> None:
  shards = _batch_shards(shape)
  said = f"the {shards} batch shards of the mesh ({_axes(ACTIVATION['B'], shape)})"
  for path, batch in _batches(e):
    if batch % e.microbatches == 0 and batch % (unit := e.microbatches * shards):
      parts = f" times {e.microbatches} microbatches" if e.microbatches > 1 else ""
      near = _multiples_near(batch, unit)
      raise Refused(f"{path} {batch} is not divisible by {said}{parts}; use {near}")
  if (batch := e.evaluation.batch) % shards:
    near = _multiples_near(batch, shards)
    raise Refused(f"evaluation.batch {batch} is not divisible by {said}; use {near}")


def _check_dims(e: Experiment, shape: dict[str, int]) -> None:
  problems: dict[str, str] = {}
  for field, letter, size, axes in _sharded(e, shape):
    shards = math.prod(shape[axis] for axis in axes)
    if size % shards and field not in problems:
      # A vocabulary can only grow: the tokenizer's tokens are all needed.
      near = padded(size) if letter == "V" else _multiples_near(size, shards)
      problems[field] = (
        f"model.{field} {size} is not divisible by {shards}, the mesh's {_axes(axes, shape)}; "
        f"use {near}, or {_smaller(e, shape, axes[-1])}"
      )
  if problems:
    raise Refused("\n".join(problems.values()))


def _sharded(e: Experiment, shape: dict[str, int]) -> Iterator[tuple[str, str, int, list[str]]]:
  """(field, letter, size, axes) of every dim of the model, for each way in which it is laid."""
  for field, (letter, size) in e.model.dims().items():
    for table in (WEIGHT, ACTIVATION, EXCHANGED):
      if axes := [axis for axis in table.get(letter, ()) if shape[axis] > 1]:
        yield field, letter, size, axes


def _smaller(e: Experiment, shape: dict[str, int], axis: str) -> str:
  """The largest smaller size of an axis that divides all that it shards, as a thing to do."""
  batches = [e.evaluation.batch, *(n // e.microbatches for _, n in _batches(e))]
  least = 2 if axis in OTHER_NAMES else 1
  for n in range(shape[axis] - 1, least - 1, -1):
    smaller = shape | {axis: n}
    sizes = [(size, axes) for _, _, size, axes in _sharded(e, smaller)]
    sizes += [(batch, ACTIVATION["B"]) for batch in batches]
    if not any(size % math.prod(smaller[axis] for axis in axes) for size, axes in sizes):
      return f"set {to_set(f'mesh.{_field(axis)}', n)}"
  return f"a smaller mesh.{_field(axis)}"


def _check_cuts(e: Experiment, shape: dict[str, int]) -> None:
  """Refuses rows that cannot be laid over the devices of context, or of sequence."""
  wide = [axis for axis in (*CONTEXT, "sequence") if shape[axis] > 1]
  if not wide:
    return
  length, model = e.data.row_length(), type(e.model).__name__
  if length is None or not e.model.cuts_rows():
    why = "the data has none" if length is None else f"a {model} takes them whole"
    raise Refused(
      f"the mesh ({_axes(wide, shape)}) cuts rows of tokens ({', '.join(wide)}), but {why}; set "
      f"{' and '.join(dict.fromkeys(_without(axis) for axis in wide))}"
    )
  from bigtrain.parallel import context

  _all(
    functools.partial(context.check_length, length, shape),
    functools.partial(context.check_model, e.model, shape),
  )


def _check_pipeline(e: Experiment, shape: dict[str, int]) -> None:
  if (stages := shape["pipeline"]) == 1:
    return
  pipelined = _pipelined(e)
  if not pipelined:
    raise Refused(
      f"the mesh has {stages} stages but {type(e.model).__name__} has no stack of layers to deal "
      f"to them; set {to_set('mesh.pipeline', 1)}"
    )
  if e.products is not None and isinstance(e.products.scaling, Delayed):
    raise Refused(
      f"products: scaling is Delayed, which cannot be within the {stages} stages of a pipeline: "
      "what its microbatches have seen would be added up; take Current, or set "
      f"{to_set('mesh.pipeline', 1)}"
    )
  for path, node in pipelined:
    for _, batch in _batches(e):
      try:
        node.check_stages(stages, _rows(batch, e, shape))
      except Refused as error:
        raise Refused(f"{path}.pipeline: {error}") from error


def _pipelined(e: Experiment) -> list[tuple[str, Any]]:
  """The configs of stacks of layers in the model, with their paths."""
  found = configs(e.model, "model")
  return [(path, node) for path, node in found if hasattr(node, "check_stages") and path]


def _rows(batch: int, e: Experiment, shape: dict[str, int]) -> int:
  """Rows between two updates of gradients that all stages together have of a shard of the batch."""
  return batch // e.microbatches * shape["pipeline"] // _batch_shards(shape)


def _batch_shards(shape: dict[str, int]) -> int:
  return math.prod(shape[axis] for axis in ACTIVATION["B"])


def _axes(axes: Iterable[str], shape: dict[str, int]) -> str:
  """Those of them that span more than one device, or the usual ones."""
  named = [axis for axis in AXES if axis in axes and (shape[axis] > 1 or axis in USUAL)]
  return ", ".join(f"{_field(axis)}={shape[axis]}" for axis in named)


def _field(axis: str) -> str:
  """The field of Mesh that sets an axis."""
  return OTHER_NAMES.get(axis, axis)


def _without(axis: str) -> str:
  """How rows are no longer cut over an axis."""
  return to_set("mesh.sequence", False) if axis == "sequence" else to_set("mesh.context", 1)


def _multiples_near(value: int, unit: int) -> str:
  below = value // unit * unit
  return f"{below} or {below + unit}" if below else str(unit)
