"""Options of the compiler that are known to be good, by chip: one table, for train and plan alike.

They go with the program that is compiled; there is no environment variable to set.
"""

import jax

Options = dict[str, str | bool]

# All TPUs: a product with a gathered weight stays one product. Cut into chunks that wait for one
# neighbour each, steps of small models took up to 1.9 times as long by the compiler's estimate.
WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

BY_KIND: dict[str, tuple[Options, ...]] = {
  "TPU v5 lite": (WHOLE_PRODUCTS,),
  "TPU v5": (WHOLE_PRODUCTS,),
  "TPU v6 lite": (WHOLE_PRODUCTS,),
}


def options(mesh: jax.sharding.Mesh | None) -> Options:
  """For a program on the devices of a mesh; of one device there is nothing to say."""
  if mesh is None or mesh.size == 1:
    return {}
  kind = mesh.devices.flat[0].device_kind
  return {name: value for more in BY_KIND.get(kind, ()) for name, value in more.items()}
