"""Tests run on eight virtual CPU devices; without a mesh they use the first.

LLVM's optimisation is off, and so is what jax 0.10 makes of fusions: they change the speed of a
program, by less than compiling it takes.
"""

import importlib.metadata
import os

HAS_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")  # Later ones know no other.

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false" if HAS_EMITTERS else "",
  ]
)

os.environ.pop("UV", None)  # Commands are spelt as without it (hints.py).

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The text and the environment of the runs in tests/runs.py."""
  from tests import runs

  with pytest.MonkeyPatch.context() as environment:
    runs.prepare(tmp_path_factory.mktemp("runs"), environment)
    yield
