"""Which axes a collective spans, and how long links take."""

import pytest

from bigtrain.plan import cost, hlo
from tests.plan.snippets import links

LINK = 9e10  # Of v5p, one way.


@pytest.mark.parametrize(
  ("groups", "chips", "axes"),
  [
    ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}", [0, 2, 4, 6], ("fsdp",)),
    ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", [0, 2, 4, 6], ("fsdp",)),
    ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", [0, 2, 4, 6], ("fsdp",)),
    ("replica_groups=[8,2]<=[16]", [0, 1], ("tensor",)),
    (
      "replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','tensor'}",
      [0, 1, 8, 9],
      ("data", "tensor"),
    ),
    ("source_target_pairs={{0,2},{2,4}}", [0, 2], ("fsdp",)),
    ("channel_id=1", list(range(16)), ("data", "fsdp", "tensor")),
  ],
)
def test_groups_in_every_notation_are_mesh_axes(groups, chips, axes):
  found = hlo._instruction(f"  %a = f32[8] all-reduce(%b), {groups}, to_apply=%sum")
  assert found is not None
  assert links("v5p:2x2x4", data=2, fsdp=4, tensor=2).group(found) == (chips, axes)


def test_a_collective_uses_one_link_along_each_open_axis_of_the_torus():
  whole = links("v5p:2x2x4", fsdp=16)
  assert whole.seconds("all-gather", 160, list(range(16))) == pytest.approx(150 / (3 * LINK))
  assert whole.seconds("all-reduce", 160, [0, 1, 2, 3]) == pytest.approx(2 * 120 / LINK)
  assert whole.seconds("collective-permute", 160, [0, 1]) == pytest.approx(160 / LINK)
  assert whole.seconds("all-to-all", 160, [0, 1, 2, 3]) == pytest.approx(120 / LINK)
  assert whole.seconds("all-gather", 160, [3]) == 0


def test_a_closed_axis_has_two_links():
  cube = links("v5p:4x4x4", fsdp=64)
  ring = [0, 1, 2, 3]  # Along the last axis.
  assert cube.seconds("reduce-scatter", 160, ring) == pytest.approx(120 / (2 * LINK))
  assert cube.seconds("all-to-all", 160, ring) == pytest.approx(60 / (2 * LINK))
  assert cube.seconds("all-gather", 160, [0, 1]) == pytest.approx(
    80 / LINK
  )  # A part of it is open.


def test_between_slices_the_slow_network_carries_it():
  two = links("v5e:2x2", 2, outer=2, fsdp=4)
  assert two.seconds("all-reduce", 1000, [0, 4]) == pytest.approx(1000 / 3.125e9)
  assert two.seconds("all-gather", 1000, [0, 1, 2, 3]) == pytest.approx(750 / 9e10)


@pytest.mark.parametrize(
  ("printed", "moved"),
  [
    ("f32[8] all-reduce(%a)", 32),
    ("(f32[8], f32[4]) all-reduce(%a, %b)", 48),
    ("f32[8] all-reduce-start(%a)", 32),
    ("(f32[8], f32[4]) all-reduce-start(%a, %b)", 48),
    ("f32[8] all-gather(%a)", 32),
    ("(f32[2], f32[8]) all-gather-start(%a)", 32),
    ("((f32[2], f32[1]), (f32[8], f32[4])) all-gather-start(%a, %b)", 48),
    ("f32[8] reduce-scatter(%a)", 128),
    ("((f32[32]), f32[8]) reduce-scatter-start(%a)", 128),
    ("((f32[32], f32[4]), (f32[8], f32[1])) reduce-scatter-start(%a, %b)", 144),
    ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)", 32),
  ],
)
def test_what_a_collective_moves_is_read_from_every_form_of_it(printed, moved):
  text = f"""ENTRY %main (a: f32[8]) -> f32[8] {{
  ROOT %c = {printed}, replica_groups={{{{0,1,2,3}}}}
}}
"""
  (found,) = cost.estimate(hlo.parse(text), links("v5e:2x2", fsdp=4)).collectives
  assert found.bytes == moved
