"""The real step, compiled for chips that are not here by the code that `train` runs.

What the compiler said is kept in the user's cache under a digest of all that decides it: the
config, this code, the libraries' versions and the topology. So a plan is made once, and a search
that was interrupted goes on.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import time
from typing import Any

import numpy as np
import zstandard

from bigtrain.config import dump
from bigtrain.data import cache
from bigtrain.experiment import Experiment
from bigtrain.failures import OUT_OF_MEMORY
from bigtrain.optim.on_host import HOST
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import Topology

FORMAT = 3  # Raised by whatever changes what is kept.
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
SOURCES = pathlib.Path(__file__).parents[1]
MEMORY = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_temp")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array of the state."""

  path: str  # Such as "model.transformer.segments.0.0.attention.q_DKGH".
  bytes: int  # On each chip.
  shape: tuple[int, ...]
  part: tuple[int, ...]  # The shape of what one chip has of it.
  on_host: bool = False  # It waits there.

  @property
  def group(self) -> str:
    return self.path.partition(".")[0]

  @property
  def name(self) -> str:
    return self.path.partition(".")[2]

  def is_like(self, dims: tuple[int, ...]) -> bool:
    """Whether an array of these dims is a whole one or a part of it, of all layers or of one."""
    ones = lambda sizes: tuple(n for n in sizes if n != 1)
    alike = (self.shape, self.part, self.shape[1:], self.part[1:])
    return len(self.shape) > 1 and ones(dims) in map(ones, alike) and len(ones(dims)) > 1


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of an experiment's step."""

  topology: Topology
  network: Network
  text: str  # The optimized HLO; "" where it did not fit.
  memory: dict[str, int]  # Bytes on each chip by memory_analysis(), and "peak".
  state: list[Leaf]
  seconds: float  # That it took to compile.
  problem: str = ""  # The compiler's message, where it did not fit.

  @property
  def state_bytes(self) -> int:
    """Of the state, what lies in the memory of each chip."""
    return sum(leaf.bytes for leaf in self.state if not leaf.on_host)


def planned(experiment: Experiment, topology: Topology) -> Compiled:
  """`compile_step`, or what it returned before.

  Raises:
    Refused: as it does.
  """
  path = cache.root() / "plans" / f"{_digest(experiment, topology)}.json.zst"
  if path.exists():
    return _read(json.loads(zstandard.decompress(path.read_bytes())), topology)
  made = compile_step(experiment, topology)
  path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
  unfinished = path.with_name(f"{path.name}.{os.getpid()}")
  unfinished.write_bytes(zstandard.compress(json.dumps(_kept(made)).encode()))
  unfinished.replace(path)
  return made


def _kept(made: Compiled) -> dict[str, Any]:
  """What is kept of it, as JSON; the topology is what it is looked up by."""
  kept = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
  network, state = made.network, [dataclasses.astuple(leaf) for leaf in made.state]
  places = {"places": network.places.tolist(), "slices": network.slices.tolist()}
  del kept["topology"]
  return kept | {"network": places | {"axes": network.axes}, "state": state}


def _read(kept: dict[str, Any], topology: Topology) -> Compiled:
  arrays = {name: np.asarray(kept["network"][name]) for name in ("places", "slices")}
  network = Network(topology, kept["network"]["axes"], **arrays)
  state = [Leaf(p, n, tuple(shape), tuple(part), host) for p, n, shape, part, host in kept["state"]]
  return Compiled(**kept | {"topology": topology, "network": network, "state": state})


def _digest(experiment: Experiment, topology: Topology) -> str:
  found = hashlib.sha256(json.dumps(dump(experiment), sort_keys=True).encode())
  found.update(f"{FORMAT} {topology.name} {topology.slices}".encode())
  found.update(" ".join(f"{name} {_version(name)}" for name in PACKAGES).encode())
  for file in sorted(SOURCES.rglob("*.py")):
    if (
      "plan" not in file.relative_to(SOURCES).parts
    ):  # A report may change; what was compiled is the same.
      found.update(file.read_bytes())
  return found.hexdigest()[:32]


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"


def compile_step(experiment: Experiment, topology: Topology) -> Compiled:
  """Compiles the training step of an experiment; touches no data, runs nothing.

  Raises:
    Refused: the experiment cannot run, its mesh does not fit the topology, or the compiler is not
      here.
  """
  import jax

  from bigtrain.program import Program
  from bigtrain.validate import validate

  if experiment.epochs is not None:  # Only the data tells how many steps; the program is the same.
    experiment = dataclasses.replace(experiment, epochs=None, steps=1)
  experiment.mesh.shape(topology.chips, where=f"in {topology.slices} x {topology.name}")
  devices = topology.devices()
  validate(experiment, len(devices), data=False)
  mesh = experiment.mesh.make(devices)
  spec = experiment.data.make(experiment.seed).spec(experiment.batch)
  network = Network.of(topology, mesh)
  with jax.set_mesh(mesh):
    program = Program(experiment, mesh)
    state, start = _leaves(program.abstract()), time.perf_counter()
    try:
      made = program.compile_step(spec)
    except jax.errors.JaxRuntimeError as error:
      if OUT_OF_MEMORY not in str(error):
        raise
      seconds = time.perf_counter() - start
      return Compiled(topology, network, "", {}, state, seconds, str(error))
    seconds = time.perf_counter() - start
  analysis: Any = made.memory_analysis()
  memory = {name: getattr(analysis, f"{name}_size_in_bytes") for name in MEMORY}
  memory["peak"] = analysis.peak_memory_in_bytes
  return Compiled(topology, network, made.as_text() or "", memory, state, seconds)


def lengths(experiment: Experiment) -> tuple[int, ...]:
  """Tokens of a row, and of its targets if they have others; of what is no text, 1."""
  if not experiment.data.row_length():
    return (1,)
  spec = experiment.data.make(experiment.seed).spec(experiment.batch)
  rows = max((array.shape for array in spec.values()), key=len)[1:2]
  targets = spec["targets"].shape[1:2] if "targets" in spec else rows
  return rows if targets == rows else rows + targets


def _leaves(state) -> list[Leaf]:
  """Every array of a state, in the order in which the step takes them."""
  import jax

  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = ".".join(
      str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
    part = leaf.sharding.shard_shape(leaf.shape)
    bytes_ = math.prod(part) * leaf.dtype.itemsize
    on_host = leaf.sharding.memory_kind == HOST
    name = name.removesuffix(".value")
    found.append(Leaf(name, bytes_, tuple(leaf.shape), tuple(part), on_host))
  return found
