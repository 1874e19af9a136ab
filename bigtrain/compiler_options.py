"""Options of the compiler that are known to be good, by chip: one table, for train and plan alike.

They go with the program that is compiled; there is no environment variable to set.
"""

import jax

Options = dict[str, str | bool]

# All TPUs: a product with a gathered weight stays one product. Cut into chunks that wait for one
# neighbour each, steps of small models took up to 1.9 times as long by the compiler's estimate.
WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# TPUs with sparse cores: collectives run there while the matrix units compute. On v5p the compiler
# refuses to overlap them in any other way ("continuation fusion is not supported").
SPARSE_CORES: Options = {
  f"xla_tpu_enable_sparse_core_collective_offload_{name}": "true"
  for name in (
    "all_gather",
    "2d_all_gather",  # Over two and three axes of the torus; without these, over one alone.
    "3d_all_gather",
    "reduce_scatter",
    "nd_reduce_scatter",  # Where a group is the whole slice: else all-reduced and cut.
    "all_reduce",
  )
}
# How the sparse cores are to be used then, as in MaxText's recipes for these chips.
SPARSE_CORES |= {
  "xla_tpu_use_tc_device_shape_on_sc": "true",
  "xla_sc_disable_megacore_partitioning": "true",
  "xla_sc_enable_instruction_fusion": "false",
}

# CPUs: the schedule that starts little at a time, so that all devices meet in one collective after
# another; where many are begun at once, threads that wait for their peers may be all there are.
# The type has to be named: `xla_cpu_enable_concurrency_optimized_scheduler` is heeded in XLA_FLAGS,
# but here, in jax 0.10 and 0.12, it does nothing.
ONE_ORDER: Options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

BY_KIND: dict[str, tuple[Options, ...]] = {
  "cpu": (ONE_ORDER,),
  "TPU v5 lite": (WHOLE_PRODUCTS,),
  "TPU v5": (WHOLE_PRODUCTS, SPARSE_CORES),
  "TPU v6 lite": (WHOLE_PRODUCTS, SPARSE_CORES),
}


def options(mesh: jax.sharding.Mesh | None) -> Options:
  """For a program on the devices of a mesh; of one device there is nothing to say."""
  if mesh is None or mesh.size == 1:
    return {}
  kind = mesh.devices.flat[0].device_kind
  return {name: value for more in BY_KIND.get(kind, ()) for name, value in more.items()}
