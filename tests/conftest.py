"""Tests run on eight virtual CPU devices; without a mesh they use the first.

LLVM's optimisation is off, and so is what jax 0.10 makes of fusions: they change the speed of a
program, by less than compiling it takes.
"""

import importlib.metadata
import os

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",  # See compiler_options.py.
    # A busy machine is no deadlock: what jax ends after 40 s may only be slow.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")  # Later ones do not know it.
    else "",
  ]
)

# Threads of XLA's pool, by default one a device: those that wait in collectives leave some to work.
os.environ.setdefault("NPROC", "32")
os.environ.pop("UV", None)  # Commands are spelt as without it (hints.py).

import jax
import pytest

HAS_EMITTERS = "emitters" in os.environ["XLA_FLAGS"]  # Whether this compiler knows the option.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The text and the environment of the runs in tests/runs.py."""
  from tests import runs

  with pytest.MonkeyPatch.context() as environment:
    runs.prepare(tmp_path_factory.mktemp("runs"), environment)
    yield
