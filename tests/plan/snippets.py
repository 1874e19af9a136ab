"""Small programs as the compiler prints them, and the links under them."""

import pathlib

import numpy as np

from bigtrain.plan import hlo
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import topology


def module(name: str) -> hlo.Module:
  return hlo.parse((pathlib.Path(__file__).parent / f"{name}.hlo.txt").read_text())


def links(name: str, count: int = 1, **axes: int) -> Network:
  """The chips of a topology in order, under a mesh of these axes."""
  found = topology(name, count)
  places = np.asarray(list(np.ndindex(found.shape)) * count)
  return Network(found, axes, places, np.repeat(np.arange(count), len(places) // count))
