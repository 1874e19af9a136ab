"""Tests run on eight virtual CPU devices; without a mesh they use the first.

LLVM's optimisation is off: it changes the speed of a program, by less than compiling it takes.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

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
