"""The real TPU compiler, where it is installed; there need be no TPU."""

import re

import pytest

from bigtrain import Mesh
from bigtrain.plan import cost, hlo, memory
from bigtrain.plan.compile import compile_step
from bigtrain.plan.topologies import topology
from bigtrain.products import Products
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
