"""The parser of optimized HLO, against counts by hand."""

import pytest

from bigtrain.plan import hlo
from tests.plan.snippets import module


def test_every_computation_and_its_instructions_are_read():
  loops = module("loops")
  assert loops.entry == "main"
  assert set(loops.computations) == {
    *("product", "inner_condition", "inner_body", "outer_condition", "outer_body", "main")
  }
  body = loops.computations["outer_body"]
  assert [i.opcode for i in body.instructions][:4] == ["parameter", *3 * ["get-tuple-element"]]
  assert body.root.name == "out" and body.root.operands == ("j", "add.1", "v")
  assert [a.dims for a in body.by_name["e"].arrays] == [(), (64, 32), (32, 16)]


def test_trip_counts_are_those_said_and_those_of_the_condition():
  loops = module("loops")
  outer, inner = loops.computations["main"], loops.computations["outer_body"]
  assert loops.trips(outer.by_name["while.2"], outer) == 7
  assert loops.trips(inner.by_name["while.1"], inner) == 5 - 2  # It begins at a copy of 2.


def test_a_loop_without_a_count_is_unknown():
  text = "HloModule m\n\nENTRY %main (a: s32[]) -> s32[] {\n  %a = s32[] parameter(0)\n}\n"
  loop = hlo._instruction("  %w = s32[] while(%a), condition=%none, body=%b")
  empty = hlo.Computation("none", (hlo._instruction("  ROOT %p = pred[] custom-call()"),))
  found = hlo.parse(text)
  found.computations["none"] = empty
  assert loop is not None and found.trips(loop, found.computations["main"]) is None


def test_attributes_of_several_lines_belong_to_their_instruction():
  kernels = module("kernels")
  main = kernels.computations[kernels.entry]
  found = [i for i in main.instructions if i.target == "tpu_custom_call"]
  assert [i.name for i in found] == ["splash_mha_fwd_residuals.1", "splash_mha_dkv_no_residuals.1"]
  assert all(i.scope.endswith("pallas_call") for i in found)
  assert main.root.root


def test_text_that_is_no_module_is_an_error():
  with pytest.raises(ValueError, match="no entry"):
    hlo.parse("HloModule nothing\n")


def test_the_products_of_a_fusion_are_its_convolutions():
  body = module("loops").computations["inner_body"]
  assert module("loops").products(body.by_name["fusion.1"], body) == 2 * 64 * 32 * 16


@pytest.mark.parametrize(
  ("line", "operands", "flops"),
  [
    # A plain product, as other backends print it.
    (
      "%d = f32[3,8,5] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
      "rhs_batch_dims={0}, rhs_contracting_dims={1}",
      ("f32[3,8,7]", "f32[3,7,5]"),
      2 * 3 * 8 * 7 * 5,
    ),
    # A product for each of 4 rows: the compiler writes the batch as a dilated spatial dim.
    (
      "%c = bf16[8,4,5] convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, "
      "dim_labels=b0f_0io->b0f",
      ("bf16[8,4,7]", "bf16[4,7,5]"),
      2 * 4 * 8 * 7 * 5,
    ),
    # What a GPU's compiler makes of a product.
    (
      '%g = (f32[8,5], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
      'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
      '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
      ("f32[8,7]", "f32[7,5]"),
      2 * 8 * 7 * 5,
    ),
    # An image: a window of 3 x 3 over 6 x 6 without its borders.
    (
      "%i = f32[2,4,4,16] convolution(%a, %b), window={size=3x3}, dim_labels=b01f_01io->b01f",
      ("f32[2,6,6,3]", "f32[3,3,3,16]"),
      2 * 2 * 4 * 4 * 16 * 3 * 3 * 3,
    ),
  ],
)
def test_flops_of_products(line, operands, flops):
  lines = [
    f"  %{n} = {shape} parameter({i})"
    for i, (n, shape) in enumerate(zip("ab", operands, strict=True))
  ]
  lines += ["  ROOT " + line]
  text = "\n".join(["HloModule m", "", "ENTRY %main (a: f32[]) -> f32[] {", *lines, "}"])
  found = hlo.parse(text)
  main = found.computations["main"]
  assert found.products(main.root, main) == flops


def test_bytes_in_memory_fill_up_tiles():
  [array] = hlo.arrays("bf16[4,2048,8,64]{3,1,2,0:T(8,128)(2,1)}")
  assert array.bytes == 4 * 2048 * 8 * 64 * 2
  assert array.padded == 4 * 8 * 2048 * 128 * 2  # 64 lanes of 128 are used.
  [vector] = hlo.arrays("f32[1000]{0:T(1024)S(1)}")
  assert (vector.padded, vector.space) == (4096, 1)
  assert hlo.arrays("s4[16]")[0].bytes == 8
