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
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # See compiler_options.py.
    "--xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")  # Later ones do not know it.
    else "",
  ]
)

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
