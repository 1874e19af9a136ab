"""Rules that jax lacks for `jax.vmap`: of what `sharding.use` is made of, inside an island.

A stage of a pipeline is a function that `jax.vmap` maps over all stages. jax (0.10 to 0.12) can do
that with an island, but it has no rules for the collectives whose gradients are parts yet to be
summed ("reduced" and "unreduced" types): it raises NotImplementedError. All that there is to say of
them is that they do to each element of the mapped dim what they do to one array. The primitives
have no public names.
"""

from jax._src import core
from jax._src.lax import parallel
from jax.interpreters import batching

CASTS = (parallel.preduced_p, parallel.vary_unreduced_cast_p, core.reduced_vary_cast_p)


def install() -> None:
  """Makes the rules known to jax; once is enough, and more do no harm."""
  for primitive in CASTS:
    batching.primitive_batchers[primitive] = _cast_rule(primitive)
  batching.fancy_primitive_batchers[parallel.all_gather_reduced_p] = _gather


def _cast_rule(primitive):
  def rule(values, dims, **params):
    return primitive.bind(*values, **params), dims[0]

  return rule


def _gather(axis_data, values, dims, *, all_gather_dimension: int, **params):
  """Gathers along the dim that `all_gather_dimension` names without the mapped one."""
  (mapped,) = dims
  if mapped is not None and mapped <= all_gather_dimension:
    all_gather_dimension += 1
  bind = parallel.all_gather_reduced_p.bind
  return bind(*values, all_gather_dimension=all_gather_dimension, **params), mapped
