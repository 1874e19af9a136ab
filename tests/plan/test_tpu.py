"""The real TPU compiler, where it is installed; there need be no TPU."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from bigtrain import Mesh
from bigtrain.kernels.attention import Form, splash
from bigtrain.plan import cost, hlo, memory
from bigtrain.plan.compile import compile_step
from bigtrain.plan.topologies import topology
from bigtrain.products import Products
from tests.plan.snippets import links
from tests.plan.test_search import study

pytest.importorskip("libtpu", reason="TPU programs are compiled by libtpu")


@pytest.mark.tpu
@pytest.mark.smoke
def test_a_step_is_compiled_and_its_products_are_the_model_s():
  """FLOPs of the products that the compiler left: those of the model's formula, and rotations."""
  e = study(mesh=Mesh(fsdp=2, tensor=2))
  attention = e.model.pattern[0].attention
  attention.kernel = "plain"  # Products in a kernel are not in the program's text,
  attention.causal = False  # and this form computes what a mask leaves out.
  e.model.remat = "none"
  where = topology("v5e:2x2")
  made = compile_step(e, where)
  module = hlo.parse(made.text)
  found = cost.estimate(module, made.network)
  heads, tokens = 4 + 2, 256 * e.batch
  turned = 2 * e.model.layers * tokens * heads * 2 * 32**2  # Rotations are products of signs.
  assert found.flops == pytest.approx((e.model.flops(256) * e.batch + turned) / 4, rel=1e-3)
  assert found.loops == 0 and found.step > 0
  assert {("fsdp",), ("tensor",)} <= {c.axes for c in found.collectives}
  assert 0 < made.memory["peak"] < where.chip.hbm
  tensors = memory.tensors(module, made.state)
  kinds = memory.by("kind", tensors)
  assert kinds["parameters"] >= sum(x.bytes for x in made.state if x.group == "model")
  assert kinds["optimizer state"] >= 2 * kinds["parameters"] * 0.9


@pytest.mark.tpu
def test_what_waits_on_the_host_takes_none_of_the_chip_and_is_copied_both_ways():
  def compiled(offload, on_host):
    e = study(mesh=Mesh(fsdp=4))
    e.model.remat, e.model.offload, e.optimizer_on_host = "products", offload, on_host
    return compile_step(e, topology("v5e:2x2"))

  here, there = compiled((), False), compiled(("up",), True)
  optimizer = sum(x.bytes for x in there.state if x.group == "optimizer")
  assert here.memory["host_argument"] == 0
  assert optimizer <= there.memory["host_argument"] < 2 * optimizer  # Small arrays are padded.
  assert there.memory["peak"] < here.memory["peak"] - optimizer / 2
  copies = cost.estimate(hlo.parse(there.text), there.network).collectives
  sent, back = (
    sum(c.bytes * c.times for c in copies if c.kind == f"copy {way} host") for way in ("to", "from")
  )
  assert optimizer < back <= sent  # What the last layer made may still be on the chip.


@pytest.mark.tpu
def test_low_products_are_int8_on_the_matrix_unit():
  e = study(mesh=Mesh(fsdp=2, tensor=2), products=Products())
  text = compile_step(e, topology("v5e:2x2")).text
  kinds = re.findall(r"= (\w+)\[\S+ (?:convolution|dot)\(", text)
  # All but the logits, whose products are wide; none is left in bfloat16.
  assert kinds.count("s32") >= 3 * 6 and "bf16" not in kinds


@pytest.mark.tpu
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_by_what_its_mask_leaves(fused):
  """Splash attention, forward and back: 7 products in two kernels, 9 in three."""
  place = jax.sharding.SingleDeviceSharding(topology("v5e:2x2").devices()[0])
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  q, k = (of(jnp.bfloat16, 2, heads, 1024, 128) for heads in (4, 2))
  segments = of(jnp.int32, 2, 1024)
  links_ = links("v5e:2x2", fsdp=4)
  for causal in (True, False):

    def loss(*arrays, causal=causal):
      form = Form(causal=causal, aligned=True)
      row = functools.partial(splash._fused if fused else splash._plain, form, False)
      return jax.vmap(row)(*arrays).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.lower(q, k, k, segments, segments).compile().as_text()
    product = 2 * math.prod(q.shape) * 1024
    found = cost.estimate(hlo.parse(text), links_).flops
    assert found == (7 if fused else 9) * product / (1 + causal)
