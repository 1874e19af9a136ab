"""What is alive at the peak, in small programs by hand."""

from bigtrain.plan import hlo, live, memory
from bigtrain.plan.compile import Leaf
from tests.plan.snippets import module

KB = 1024


def sizes(text: str) -> dict[str, int]:
  return {b.made.name: b.bytes for b in live.at_peak(hlo.parse(text)) if b.bytes}


def test_buffers_die_at_their_last_use():
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %b = f32[4096]{0} broadcast(%a), dimensions={}
  %c = f32[8192]{0} broadcast(%b), dimensions={}
  %d = f32[1024]{0} slice(%c), slice={[0:1024]}
  %v = f32[99999]{0:T(1024)S(1)} broadcast(%d), dimensions={}
  %e = f32[8192]{0} broadcast(%d), dimensions={}
  ROOT %f = f32[1024]{0} slice(%e), slice={[0:1024]}
}
"""
  assert sizes(text) == {"a": 4 * KB, "b": 16 * KB, "c": 32 * KB}


def test_an_argument_takes_its_memory_before_it_is_named():
  text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[1024], b: f32[2048]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %c = f32[8192]{0} broadcast(%a), dimensions={}
  %d = f32[1024]{0} slice(%c), slice={[0:1024]}
  %b = f32[2048]{0} parameter(1)
  ROOT %f = f32[1024]{0} add(%d, %b)
}
"""
  assert sizes(text) == {"a": 4 * KB, "b": 8 * KB, "c": 32 * KB, "d": 4 * KB}


def test_a_loop_works_in_the_memory_that_it_is_given():
  text = """HloModule m, is_scheduled=true

%update (p0: f32[8,1024], p1: f32[1024], p2: s32[]) -> f32[8,1024] {
  %p0 = f32[8,1024]{1,0} parameter(0)
  %p1 = f32[1024]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,1024]{1,0} bitcast(%p1)
  ROOT %put = f32[8,1024]{1,0} dynamic-update-slice(%p0, %row, %p2, %p2)
}

%condition (c: (s32[], f32[8,1024])) -> pred[] {
  %c = (s32[], f32[8,1024]{1,0}) parameter(0)
  ROOT %go = pred[] custom-call(%c), custom_call_target="Opaque"
}

%body (b: (s32[], f32[8,1024])) -> (s32[], f32[8,1024]) {
  %b = (s32[], f32[8,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %kept = f32[8,1024]{1,0} get-tuple-element(%b), index=1
  %work = f32[2048]{0} broadcast(%i), dimensions={}
  %row = f32[1024]{0} slice(%work), slice={[0:1024]}
  %more = f32[8,1024]{1,0} fusion(%kept, %row, %i), kind=kLoop, calls=%update
  ROOT %out = (s32[], f32[8,1024]{1,0}) tuple(%i, %more)
}

ENTRY %main (n: s32[]) -> f32[8,1024] {
  %n = s32[] parameter(0)
  %empty = f32[8,1024]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %given = (s32[], f32[8,1024]{1,0}) tuple(%n, %empty)
  %while = (s32[], f32[8,1024]{1,0}) while(%given), condition=%condition, body=%body
  %result = f32[8,1024]{1,0} get-tuple-element(%while), index=1
  ROOT %sum = f32[8,1024]{1,0} add(%result, %result)
}
"""
  found = sizes(text)
  assert found.pop("n") == 4
  assert found == {"empty": 32 * KB, "work": 8 * KB, "row": 4 * KB}


def test_arguments_stay_and_are_named_by_the_state():
  state = [
    Leaf("model.blocks.up_DF", 4096, (64, 64), (64, 32)),
    Leaf("optimizer.0.mu.blocks.up_DF", 1024, (32, 16), (32, 16)),
  ]
  found = memory.tensors(module("loops"), state)
  named = {(t.kind, t.where) for t in found}
  assert {("parameters", "blocks.up_DF"), ("optimizer state", "0.mu.blocks.up_DF")} <= named
  padded = {"parameters": 64 * 128 * 2, "optimizer state": 32 * 128 * 2}
  assert {kind: memory.by("kind", found)[kind] for kind in padded} == padded


def test_places_in_the_model_are_read_from_scopes():
  scopes = {
    "jit(step)/jvp()/while/body/eval_jaxpr/block0/attention/dot_general": "block0.attention",
    "jit(step)/transpose(jvp())/while/body/block1/block1/checkpoint/feed_forward/mul": (
      "block1.feed_forward"
    ),
    "jit(step)/jvp(loss)/shard_map/while": "loss",
    "jit(step)/jvp(embed)/gather": "embed",
    "jit(step)/reduce_sum": "",
  }
  assert {scope: memory.place(scope) for scope in scopes} == scopes
