"""--smoke: the same experiment, small enough to end within a minute on two CPU cores.

Sizes are capped by the names that models and data give them; where that is not enough, a config has
a `smoke` of its own. The mesh becomes what is attached, for the experiment's own may need a pod.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from bigtrain.config import Refused, configs, join
from bigtrain.console import say
from bigtrain.experiment import DataConfig, Experiment
from bigtrain.mesh import Mesh
from bigtrain.optim.schedule import Schedule
from bigtrain.validate import padded

STEPS = 20
ROWS = 8  # Rows in a microbatch, and in a batch of evaluation.
EVERY = 10  # Steps between evaluations and between checkpoints.
LENGTHS = {"seq": 128, "length": 128}  # Tokens of a row, positions of a table.
WIDTHS = {"dim": 64, "layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 16}
WIDTHS |= {"experts": 8, "top_k": 2, "shared": 128, "groups": 4, "kept": 2}
WIDTHS |= {"q_rank": 32, "kv_rank": 32, "rotary_dim": 16, "value_dim": 16}


def shrink(experiment: Experiment) -> Experiment:
  """A small copy of `experiment` that passes through every phase of a run.

  Says what it takes in the place of files that are not there, or too large to try.
  """
  e = copy.deepcopy(experiment)
  e.model, e.data = (capped(c, LENGTHS | WIDTHS).smoke() for c in (e.model, e.data))
  _say_replaced(experiment.data, e.data)
  known, needed = e.model.vocabulary(), e.data.vocabulary()
  if known is not None and needed is not None and not needed <= known <= padded(needed):
    for _, node in configs(e.model):
      if hasattr(node, "vocab"):
        node.vocab = padded(needed)
  if (classes := e.data.n_classes()) is not None:
    for _, node in configs(e.model):
      if hasattr(node, "classes"):
        node.classes = classes
  e.steps, e.epochs = min(e.steps or STEPS, STEPS), None
  for _, node in configs(e.optimizer):
    if isinstance(node, Schedule):
      node.warmup = min(node.warmup, max(e.steps // 10, 1))
  rows = ROWS * e.microbatches
  e.batch = min(e.batch, rows)
  stages = e.batch_stages[: e.steps - 1]
  gap = e.steps // (len(stages) + 1)
  e.batch_stages = tuple(((i + 1) * gap, min(n, rows)) for i, (_, n) in enumerate(stages))
  e.mesh = Mesh()
  e.weights_from, e.new_weights = None, ()
  e.evaluation = dataclasses.replace(
    e.evaluation,
    every=min(e.evaluation.every, EVERY),
    batch=ROWS,
    sample_tokens=min(e.evaluation.sample_tokens, 20),
  )
  e.checkpoints.every = min(e.checkpoints.every, EVERY)
  e.checkpoints.keep_every = e.checkpoints.keep_every and min(e.checkpoints.keep_every, EVERY)
  e.logging.every, e.logging.layers_every = 1, min(e.logging.layers_every, EVERY)
  return e


def _say_replaced(before: DataConfig, after: DataConfig) -> None:
  """A line for each part of the data that is now of another kind."""
  now = dict(configs(after))
  for path, node in configs(before):
    if type(node) is not (kind := type(now[path])):
      why = "it is too large to try"
      try:
        node.check() if hasattr(node, "check") else node.size()
      except Refused as error:
        why = str(error)
      say(f"{join('data', path)}: {why}; --smoke takes {kind.__name__} in its place")


def capped(root, caps: Mapping[str, int]):
  """`root` with the sizes that have these names capped, widths to a power of two, so that one
  divides another."""

  def cap(size: Any, name: str) -> Any:
    if type(size) is not int or size < 1:
      return size
    return min(size if name in LENGTHS else 1 << (size.bit_length() - 1), caps[name])

  for _, node in configs(root):
    for name in caps:
      size = getattr(node, name, None)
      if isinstance(size, tuple):  # Of one layer after the other.
        setattr(node, name, tuple(cap(n, name) for n in size))
      elif type(size) is int:
        setattr(node, name, cap(size, name))
  return root
