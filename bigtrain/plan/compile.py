"""The real step, compiled for chips that are not here by the code that `train` runs."""

import dataclasses
import re
import time
from typing import TYPE_CHECKING, Any

from bigtrain.experiment import Experiment
from bigtrain.failures import OUT_OF_MEMORY
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import Topology

if TYPE_CHECKING:
  import jax

MEMORY = ("argument", "output", "alias", "temp", "generated_code")


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of an experiment's step."""

  topology: Topology
  network: Network
  text: str  # The optimized HLO; "" where it did not fit.
  memory: dict[str, int]  # Bytes on each chip by memory_analysis(), and "peak".
  state: list[tuple[str, int]]  # (path in the state, bytes on each chip).
  seconds: float  # That it took to compile.
  problem: str = ""  # The compiler's message, where it did not fit.


def compile_step(experiment: Experiment, topology: Topology) -> Compiled:
  """Compiles the training step of a (validated) experiment; touches no data, runs nothing.

  Raises:
    Refused: the mesh does not fit the topology, or the compiler is not here.
  """
  import jax

  from bigtrain.program import Program
  from bigtrain.validate import check_mesh

  devices = topology.devices()
  check_mesh(experiment, len(devices))
  mesh = experiment.mesh.make(devices)
  spec = experiment.data.make(experiment.seed).spec(experiment.batch)
  network = Network.of(topology, mesh)
  with jax.set_mesh(mesh):
    program = Program(experiment, mesh)
    state, start = _sizes(program.abstract()), time.perf_counter()
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


def _sizes(state) -> list[tuple[str, int]]:
  """Every array of a state by its path, with the bytes of the part that one device holds."""
  import jax

  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = re.sub(r"[\[\]'.]+", ".", jax.tree_util.keystr(path)).strip(".")
    here = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for n in here:
      size *= n
    found.append((name.removesuffix(".value"), size))
  return found
