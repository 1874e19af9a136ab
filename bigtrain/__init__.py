"""bigtrain: train large neural networks in JAX, from a laptop to a pod.

The names below are what an experiment file or a notebook needs first; each is loaded when it is
used, so that `import bigtrain` alone does not import jax.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from bigtrain.config import Refused
  from bigtrain.experiment import Checkpoints, Evaluation, Experiment, Logging
  from bigtrain.mesh import Mesh
  from bigtrain.run import load_run
  from bigtrain.train import train

__all__ = [
  "Checkpoints",
  "Evaluation",
  "Experiment",
  "Logging",
  "Mesh",
  "Refused",
  "load_run",
  "train",
]

_ROOMS = {
  "config": ("Refused",),
  "experiment": ("Checkpoints", "Evaluation", "Experiment", "Logging"),
  "mesh": ("Mesh",),
  "run": ("load_run",),
  "train": ("train",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str):
  if name not in _ROOM_OF:
    raise AttributeError(f"module 'bigtrain' has no attribute {name!r}")
  return getattr(importlib.import_module(f"bigtrain.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
  return __all__


class _Package(types.ModuleType):
  """Keeps `bigtrain.train` the function: importing the room of that name would hide it."""

  def __setattr__(self, name: str, value) -> None:
    hides = name in _ROOM_OF and isinstance(value, types.ModuleType)
    super().__setattr__(name, getattr(value, name) if hides else value)


sys.modules[__name__].__class__ = _Package
