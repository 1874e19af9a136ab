"""Tests run on eight virtual CPU devices; without a mesh they use the first."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
