"""Tests run on eight virtual CPU devices; without a mesh they use the first.

LLVM's optimisation is off: it changes the speed of a program, by less than compiling it takes.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
