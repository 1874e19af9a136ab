"""An option that a compiler takes and does not heed helps nobody: these are heeded."""

import jax
import jax.numpy as jnp
import pytest

from bigtrain import compiler_options
from bigtrain.mesh import Mesh

CONCURRENT = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}


@pytest.fixture(scope="module")
def lowered():
  """Chains of products and sums over devices that do not depend on each other."""

  def chains(x):
    found = []
    for i in range(4):
      y = jnp.sin(x + i) @ jnp.cos(x - i).T
      found.append(jax.lax.psum(jnp.tanh(y @ y), "fsdp"))
    return sum(found)

  mesh = Mesh(fsdp=8).make()
  f = jax.shard_map(chains, mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P())
  place = jax.NamedSharding(mesh, jax.P("fsdp"))
  return mesh, jax.jit(f).lower(jax.ShapeDtypeStruct((256, 32), jnp.float32, sharding=place))


def test_the_order_of_a_cpu_program_is_the_one_asked_for(lowered):
  mesh, program = lowered
  text = lambda options: program.compile(compiler_options=options).as_text()
  assert text(CONCURRENT | compiler_options.options(mesh)) != text(CONCURRENT)
