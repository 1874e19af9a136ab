"""Every process traces the same program: nothing in it follows from the order of a set.

Sets of strings have another order in each process. Processes whose collectives differ by that wait
for each other for ever.
"""

import hashlib
import os
import subprocess
import sys

import jax
import pytest

from bigtrain.mesh import Mesh
from bigtrain.program import Program
from tests import families, packed, runs

CASES = {
  "gpt2": Mesh(data=2, fsdp=2, tensor=2),
  "moe": Mesh(data=2, fsdp=1, expert=2, context=2),
  "llama": Mesh(fsdp=2, context=2, tensor=2, ulysses=True, sequence=True),
  "mla": Mesh(pipeline=2, fsdp=2, tensor=2),
}


def digest(family: str) -> str:
  """Of the traced step that also collects statistics."""
  e = families.small(family, CASES[family])
  with jax.set_mesh(mesh := e.mesh.make()):
    program = Program(e, mesh)
    batch = packed.abstract_batch(e)
    step = jax.jit(lambda *args: program.step(*args, statistics=True))
    return hashlib.sha256(step.lower(program.abstract(), batch).as_text().encode()).hexdigest()


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in CASES if family != "gpt2"]


@pytest.mark.parametrize("family", ["gpt2", *SLOW])
def test_the_step_does_not_depend_on_the_order_of_sets(family):
  code = f"from tests import test_same_program as t; print(t.digest({family!r}))"

  def start(seed: int) -> subprocess.Popen:
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=subprocess.PIPE)

  digests = [process.communicate(timeout=300)[0] for process in [start(1), start(3)]]
  assert digests[0] and digests[0] == digests[1]
