"""The predicted time: each rule against a sum by hand."""

import pytest

from bigtrain.plan import cost, hlo
from tests.plan.snippets import links, module

CLOCK, LINK, BANDWIDTH = 1.5e9, 4.5e10, 8.19e11  # Of v5e.
GATHER = 512 * 1024 * 2 * 3 / 4 / (2 * LINK)  # Four chips in a square, one link along each axis.


def test_loops_multiply_cycles_and_flops():
  found = cost.estimate(module("loops"), links("v5e:2x2", data=1, fsdp=4))
  assert found.seconds["matrix"] == pytest.approx(7 * 3 * 1000 / CLOCK)
  assert found.seconds["vector"] == pytest.approx(7 * 50 / CLOCK)
  assert found.flops == 7 * 3 * 2 * 64 * 32 * 16
  assert max(found.timed, key=lambda t: t.seconds).times == 7 * 3
  assert sum(t.seconds for t in found.timed) == pytest.approx(found.step)
  assert found.loops == 0
  scope = "jit(step)/jvp()/while/body/block0/feed_forward/dot_general"
  assert found.scopes[scope] == pytest.approx(7 * 3 * 1000 / CLOCK)


def test_a_collective_is_hidden_by_what_is_computed_between_its_start_and_its_end():
  found = cost.estimate(module("pairs"), links("v5e:2x2", data=1, fsdp=4))
  continued, reduced, started = found.collectives
  assert [c.kind for c in found.collectives] == ["all-gather", "all-reduce", "all-gather"]
  assert all(c.axes == ("fsdp",) and c.times == 1 for c in found.collectives)
  assert continued.seconds == pytest.approx(GATHER)
  assert continued.asynchronous and not reduced.asynchronous and started.asynchronous
  assert GATHER > 15000 / CLOCK - 2e-6
  assert continued.exposed == pytest.approx(max(0.0, GATHER - 15000 / CLOCK), abs=1e-12)
  assert reduced.seconds == reduced.exposed == pytest.approx(4 * GATHER)  # float32, and twice.
  assert started.exposed == 0.0  # 2 ms of compute hide it.
  assert found.seconds["exposed"] == pytest.approx(continued.exposed + reduced.exposed)


def test_collectives_wait_for_the_network():
  """Two that are issued together take twice as long; compute for one of them hides one."""
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[128,1024]) -> bf16[512,1024] {
  %a = bf16[128,1024]{1,0} parameter(0)
  %s1 = (bf16[128,1024]{1,0}, bf16[512,1024]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %s2 = (bf16[128,1024]{1,0}, bf16[512,1024]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %b = bf16[128,1024]{1,0} add(%a, %a), backend_config={"estimated_cycles":"CYCLES"}
  %d1 = bf16[512,1024]{1,0} all-gather-done(%s1)
  ROOT %d2 = bf16[512,1024]{1,0} all-gather-done(%s2)
}
"""
  text = text.replace("CYCLES", str(round(GATHER * CLOCK)))
  found = cost.estimate(hlo.parse(text), links("v5e:2x2", fsdp=4))
  assert [c.exposed for c in found.collectives] == pytest.approx([0.0, GATHER], abs=1e-9)


def test_a_reduce_scatter_that_is_fused_costs_what_one_of_its_own_does():
  text = """HloModule m, is_scheduled=true

%sum (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %add.0 = f32[] add(%l, %r)
}

%all-reduce-scatter (p: bf16[512,1024], i: s32[]) -> bf16[128,1024] {
  %p = bf16[512,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %all = bf16[512,1024]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %part = bf16[128,1024]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={128,1024}
}

ENTRY %main (a: bf16[512,1024], i: s32[]) -> bf16[128,1024] {
  %a = bf16[512,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = bf16[128,1024]{1,0} fusion(%a, %i), kind=kCustom, calls=%all-reduce-scatter
  ROOT %two = bf16[128,1024]{1,0} reduce-scatter(%a), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
  fused, plain = cost.estimate(hlo.parse(text), links("v5e:2x2", fsdp=4)).collectives
  assert fused.kind == plain.kind == "reduce-scatter"
  assert fused.bytes == plain.bytes == 512 * 1024 * 2
  assert fused.exposed == plain.exposed == pytest.approx(GATHER)


def test_between_slices_a_send_and_its_receive_are_a_collective_of_the_slow_network():
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (f32[1024,1024]{1,0}, u32[], token[]) send(%a, %t), channel_id=6, is_host_transfer=true, SAID
  %r = (f32[1024,1024]{1,0}, u32[], token[]) recv(%t), channel_id=5, is_host_transfer=true, SAID
  %b = f32[1024,1024]{1,0} add(%a, %a), backend_config={"estimated_cycles":"150000"}
  %c = f32[1024,1024]{1,0} all-reduce(%b), replica_groups={{0,1,2,3},{4,5,6,7}}
  %d = token[] send-done(%s), channel_id=6, is_host_transfer=true
  %e = (f32[1024,1024]{1,0}, token[]) recv-done(%r), channel_id=5, is_host_transfer=true
  ROOT %f = f32[1024,1024]{1,0} get-tuple-element(%e), index=0
}
"""
  said = 'frontend_attributes={_xla_host_transfer_rendezvous="x_0",'
  text = text.replace("SAID", said + '_xla_megascale_transfer_type="ALL_REDUCE"}')
  slow, fast = cost.estimate(hlo.parse(text), links("v5e:2x2", 2, slices=2, fsdp=4)).collectives
  assert (slow.kind, slow.axes, slow.link) == ("all-reduce", ("slices",), "slices")
  assert slow.seconds == pytest.approx(2 * 4 * 2**20 / 2 / 3.125e9)
  assert fast.axes == ("fsdp",)
  assert fast.exposed == pytest.approx(fast.seconds)  # It waits for no slow one.
  assert slow.exposed == pytest.approx(slow.seconds - 150000 / CLOCK - fast.seconds)


def test_what_has_no_estimate_takes_its_bytes_and_is_called_uncounted():
  found = cost.estimate(module("pairs"), links("v5e:2x2", data=1, fsdp=4))
  assert found.seconds["moved"] == pytest.approx(2 * 512 * 1024 * 2 / BANDWIDTH)
  assert found.uncounted == found.seconds["moved"]
  assert found.step == pytest.approx(sum(found.seconds.values()))


def test_kernels_of_attention_take_their_products_at_60_percent():
  """Splash attention with a fused backward pass, as it was printed for v5e."""
  found = cost.estimate(module("kernels"), links("v5e:2x2", fsdp=4))
  rows, heads, positions, width = 2, 4, 512, 128
  product = 2 * rows * heads * positions**2 * width / 2  # A causal mask leaves half.
  assert found.flops == (2 + 5) * product
  assert found.seconds["kernels"] == pytest.approx(7 * product / 0.6 / 197e12)
  assert found.uncounted == pytest.approx(found.seconds["kernels"] + found.seconds["moved"])


def test_a_backward_pass_of_two_kernels_makes_two_products_more():
  text = """HloModule m

ENTRY %main (q: bf16[4,512,128], k: bf16[2,512,128]) -> bf16[4,512,128] {
  %q = bf16[4,512,128]{2,1,0} parameter(0)
  %k = bf16[2,512,128]{2,1,0} parameter(1)
  %c = s32[512,128]{1,0} iota(), iota_dimension=0
  %splash_mha_dkv_no_residuals = (bf16[2,512,128]{2,1,0}, bf16[2,512,128]{2,1,0}) KERNEL
  ROOT %splash_mha_dq_no_residuals = bf16[4,512,128]{2,1,0} KERNEL
}
"""
  text = text.replace("KERNEL", 'custom-call(%q, %k, %k, %c), custom_call_target="tpu_custom_call"')
  found = cost.estimate(hlo.parse(text), links("v5e:2x2", fsdp=4))
  assert found.flops == (4 + 3) * 2 * 4 * 512**2 * 128 / 2


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_both_directions_makes_all_of_its_products(masked, segmented):
  """Splash attention of two rows as it is printed: a mask comes as the columns of the queries."""
  text = """HloModule m

ENTRY %main (q: bf16[2,4,512,128], k: bf16[2,2,512,128]) -> bf16[2,4,512,128] {
  %q = bf16[2,4,512,128]{3,2,1,0} parameter(0)
  %k = bf16[2,2,512,128]{3,2,1,0} parameter(1)
  %n = s8[1,2,2]{2,1,0} constant({ { { 0, 1 }, { 0, 1 } } })
  %qs = s32[2,512,128]{2,1,0} broadcast(%n), dimensions={}
  %ks = s32[2,8,512]{2,1,0} broadcast(%n), dimensions={}
  %c = s32[512,128]{1,0} iota(), iota_dimension=0
  ROOT %splash_mha_fwd_NAME = bf16[2,4,512,128]{3,2,1,0} custom-call(%n, %n, %q, %k, %kREST), HOW
}
"""
  rest = ", %qs, %ks" * segmented + ", %c" * masked
  name = "segmented_residuals" if segmented else "residuals"
  text = text.replace("NAME", name).replace("REST", rest)
  text = text.replace("HOW", 'custom_call_target="tpu_custom_call"')
  found = cost.estimate(hlo.parse(text), links("v5e:2x2", fsdp=4))
  assert found.flops == 2 * 2 * 2 * 4 * 512**2 * 128 / (1 + masked)


@pytest.mark.parametrize("mask, seen", [("CAUSAL", 0.5), ("NO_MASK", 1.0)])
def test_attention_by_cudnn_takes_its_products_too(mask, seen):
  """As it was printed for an H100: rows of 8 x 1,024 positions, 12 heads of 64."""
  text = """HloModule m

ENTRY %main (q: bf16[8,1024,12,64], m: bf16[8,1,1024,1024]) -> ROWS {
  %q = bf16[8,1024,12,64]{3,2,1,0} parameter(0)
  %m = bf16[8,1,1024,1024]{3,2,1,0} parameter(1)
  %fwd = (OUT, ROWS, u8[0]{0}) custom-call(%q, %q, %q, %m), CUDNN", CONFIG
  %s = ROWS get-tuple-element(%fwd), index=1
  %bwd = (OUT, OUT, OUT, u8[0]{0}) custom-call(%q, %q, %q, %s, %q, %m, %q), CUDNNBackward", CONFIG
  ROOT %out = ROWS copy(%s)
}
"""
  by_name = {"OUT": "bf16[8,12,1024,64]{3,1,2,0}", "ROWS": "f32[8,12,1024]{2,1,0}"}
  by_name["CONFIG"] = f'backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"}}}}'
  by_name["CUDNN"] = 'custom_call_target="__cudnn$fmhaScaleBiasSoftmax'
  for name, by in by_name.items():
    text = text.replace(name, by)
  found = cost.estimate(hlo.parse(text), links("h100:8", fsdp=8))
  flops = (2 + 5) * 2 * 8 * 12 * 1024**2 * 64 * seen
  assert found.flops == flops
  assert found.seconds["kernels"] == pytest.approx(flops / 0.6 / 989e12)


def test_copies_to_and_from_the_host_are_two_queues_of_their_own():
  """Of 8 MiB each: one each way at once, then one that waits. A copy on the chip is hidden."""
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[2,1024,1024], h: f32[4,2,1024,1024]) -> f32[2,1024,1024] {
  %a = f32[2,1024,1024]{2,1,0} parameter(0)
  %h = f32[4,2,1024,1024]{3,2,1,0:S(5)} parameter(1)
  %z = s32[] constant(0)
  %s1 = (f32[2,1024,1024]{2,1,0:S(5)}, f32[2,1024,1024]{2,1,0}, u32[]) copy-start(%a)
  %s2 = ((HOST, s32[]), PART, u32[]) dynamic-slice-start(%h, %z)
  %s3 = ((HOST, PART, s32[]), HOST, u32[]) dynamic-update-slice-start(%h, %a, %z)
  %s4 = (f32[2,1024,1024]{2,1,0:S(1)}, f32[2,1024,1024]{2,1,0}, u32[]) copy-start(%a)
  %b = f32[2,1024,1024]{2,1,0} add(%a, %a), backend_config={"estimated_cycles":"CYCLES"}
  %d1 = f32[2,1024,1024]{2,1,0:S(5)} copy-done(%s1)
  %d2 = f32[1,2,1024,1024]{3,2,1,0} dynamic-slice-done(%s2)
  %d4 = f32[2,1024,1024]{2,1,0:S(1)} copy-done(%s4)
  %d3 = f32[4,2,1024,1024]{3,2,1,0:S(5)} dynamic-update-slice-done(%s3)
  ROOT %c = f32[2,1024,1024]{2,1,0} bitcast(%b)
}
"""
  seconds = 2**23 / 1.6e10
  text = text.replace("HOST", "f32[4,2,1024,1024]{3,2,1,0:S(5)}")
  text = text.replace("PART", "f32[1,2,1024,1024]{3,2,1,0}")
  text = text.replace("CYCLES", str(round(seconds * CLOCK)))
  found = cost.estimate(hlo.parse(text), links("v5e:2x2", fsdp=4))
  kinds = ["copy to host", "copy from host", "copy to host"]
  assert [c.kind for c in found.collectives] == kinds
  assert [c.seconds for c in found.collectives] == pytest.approx([seconds] * 3)
  assert [c.exposed for c in found.collectives] == pytest.approx([0, 0, seconds], abs=1e-8)
