"""The search: closed forms by hand, what they may drop, and the order of what was compiled."""

import math
import random
from collections import Counter

import jax
import pytest

from bigtrain import Experiment, Mesh, Refused
from bigtrain.data.text import TextData
from bigtrain.models import presets
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.plan import explain, search
from bigtrain.plan.closed import Guess, Sizes, guess
from bigtrain.plan.compile import Compiled, Leaf
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import Topology, topology
from tests import toys
from tests.plan.snippets import links

LINK = 4.5e10  # Of v5e, one way.


def study(**fields) -> Experiment:
  """A small transformer on rows of 256 bytes."""
  model = presets.llama3("1b")
  model.layers, model.dim, model.vocab = 2, 128, 384
  attention, feed_forward = model.pattern[0].attention, model.pattern[0].feed_forward
  attention.heads, attention.kv_heads, attention.head_dim, feed_forward.hidden = 4, 2, 32, 512
  fields = {"batch": 16, "steps": 100} | fields
  return Experiment(
    model=model, data=TextData(), optimizer=AdamW(lr=1e-3), objective=CausalLM(), **fields
  )


@pytest.fixture
def grid(monkeypatch) -> Topology:
  """Eight chips, of which CPU devices stand in."""
  monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[: self.chips])
  return topology("v5e:2x4")


def test_closed_forms_are_those_of_the_book():
  e = study(microbatches=2, mesh=Mesh(fsdp=8))
  e.model.remat = "full"
  where, chips = topology("v5e:2x4"), links("v5e:2x4", **e.mesh.shape(8))
  sizes = Sizes(weights=4 * 10**6, optimizer=8 * 10**6, parameters=10**6)
  found = guess(e, where, sizes, chips)
  rows = 16 / 8 / 2  # That a chip has at a time.
  assert found.compute == pytest.approx(e.model.flops(256) * 16 / 8 * (4 / 3) / (0.8 * 197e12))
  gathered = 2 * 10**6 * 7 / 8 / (2 * LINK)  # In bfloat16, over two open axes of the torus.
  assert found.gathers == pytest.approx(2 * 2 * gathered)
  assert found.scatters == pytest.approx(2 * gathered)
  assert found.tensor == found.replicas == 0
  assert found.state == 12 * 10**6 / 8
  assert found.kept == 2 * rows * 256 * 2 * 128  # The input of both layers.
  e.mesh, e.model.remat = Mesh(fsdp=4, tensor=2), "qkv"
  found = guess(e, where, sizes, links("v5e:2x4", **e.mesh.shape(8)))
  widths = 128 + (2 * 128 + 2 * 64) / 2  # Whole, then q, attention, k and v by heads.
  assert found.kept == 2 * (16 / 4 / 2) * 256 * 2 * widths
  passed = (
    2 * (16 / 4 / 2) * 256 * 128 * 2 * 2
  )  # Bytes: layers, rows, positions, width, microbatches.
  assert found.tensor == pytest.approx(6 * 2 * passed / 2 / LINK)
  e.optimizer_on_host, e.model.offload = True, ("q", "attention")
  found = guess(e, where, sizes, links("v5e:2x4", **e.mesh.shape(8)))
  assert found.state == 4 * 10**6 / 8 and found.host == 8 * 10**6 / 8 / 1.6e10
  assert found.kept == 2 * (16 / 4 / 2) * 256 * 2 * (128 + 2 * 64 / 2)
  assert found.offload == pytest.approx(2 * (16 / 4) * 256 * 2 * 2 * 128 / 2 / 1.6e10)
  assert found.seconds == pytest.approx(
    max(found.compute, found.gathers, found.offload) + found.scatters + found.tensor + found.host
  )


def test_pruning_never_drops_the_best_where_closed_forms_err_within_the_margin():
  """Every small case exhaustively: truths are drawn within the margin of the closed forms."""
  draw, hbm = random.Random(0), 16.0
  for _ in range(500):
    many = [
      search.Candidate(
        {"batch": draw.choice([8, 16])}, _guess(draw.uniform(1, 9), draw.uniform(2, 40))
      )
      for _ in range(12)
    ]
    err = lambda: search.MARGIN ** draw.uniform(-1, 1)
    truth = [
      (c.settings["batch"] / (c.guess.seconds * err()), c.guess.memory * err()) for c in many
    ]
    fits = [i for i, (_, memory) in enumerate(truth) if memory <= hbm]
    if fits:
      best = many[max(fits, key=lambda i: truth[i][0])]
      assert any(c is best for c in search.kept(many, hbm, Counter()))


def test_pruning_drops_what_is_far_too_slow_or_too_large():
  dropped = Counter()
  fast, slow, large = (
    search.Candidate({"batch": 8}, _guess(*of)) for of in [(1.0, 4), (3.0, 4), (0.5, 25)]
  )
  assert search.kept([slow, large, fast], 16, dropped) == [fast]
  assert sorted(dropped.values()) == [1, 1]


def test_near_twins_are_compiled_behind_what_differs():
  """In closed form the four fastest are of one mesh: two policies, in one microbatch or in two."""

  def made(seconds, memory=4.0, *, fsdp=8, remat="none", microbatches=1):
    settings = {"mesh.data": 8 // fsdp, "mesh.fsdp": fsdp, "batch": 8, "model.remat": remat}
    return search.Candidate(settings | {"microbatches": microbatches}, _guess(seconds, memory))

  first, twin = made(1.0), made(1.01, microbatches=2)
  policy, both = made(1.02, remat="products"), made(1.03, remat="products", microbatches=2)
  mesh, joined = made(1.1, fsdp=4), made(1.2, fsdp=4, remat="products")
  slow, large = made(1.6, fsdp=2), made(0.9, 17.0, fsdp=1)
  given = [first, twin, policy, both, mesh, joined, slow, large]
  wanted = [first, policy, mesh, twin, both, joined, slow, large]
  assert [*map(id, search.apart(given, 16.0))] == [*map(id, wanted)]


def _guess(seconds: float, memory: float) -> Guess:
  return Guess(seconds, 0, 0, 0, 0, 0, 0, state=memory, kept=0, working=0)


def test_every_candidate_is_kept_or_counted(grid):
  e = study()
  found = search.prune(e, grid)
  everything = list(search.candidates(e, grid, ()))
  assert len(found.candidates) + sum(found.dropped.values()) == len(everything) == 10 * 5 * 6
  whole = [tuple(s[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")) for s in everything]
  assert (2, 2, 2) in whole and all(math.prod(sizes) == 8 for sizes in whole)
  assert all(c.settings["mesh.tensor"] <= 2 for c in found.candidates)  # There are 2 kv heads.


def test_a_search_of_what_is_no_transformer_is_refused(grid):
  with pytest.raises(Refused, match="--search knows transformers, not Model"):
    search.prune(toys.experiment(), grid)


def test_the_best_few_are_compiled_and_ranked_by_what_the_compiler_says(grid):
  found = search.prune(study(), grid)
  took = [0.3, 0.1, 0.2]
  peaks = [1, 99, 1]
  asked = []

  def compile(candidate: search.Candidate) -> dict:
    at = next(i for i, c in enumerate(found.candidates) if c is candidate)
    asked.append(at)
    return {"step_seconds": took[at], "memory": {"peak": peaks[at], "chip": 10}}

  ranked = search.search(found, few=3, workers=1, compile=compile)
  assert asked == [0, 1, 2]
  assert [c.plan["step_seconds"] for c in ranked if c.plan] == [0.2, 0.3, 0.1]
  assert [c.fits for c in ranked] == [True, True, False]
  e = search.applied(study(), ranked[0].settings)
  assert ranked[0].line().startswith(f"--mesh.data {e.mesh.data} --mesh.fsdp {e.mesh.fsdp} ")
  assert f"--model.remat {e.model.remat}" in ranked[0].line()


def test_changes_that_fit_are_found_for_what_does_not(grid):
  e = study(batch=64)
  e.model.remat, e.data.seq = "none", 8192  # So that activations are nearly all.
  network = Network.of(grid, e.mesh.make(grid.devices()))
  problem = "memory required for HLO temporaries (40.00G) exceeds available HBM (15.75G)"
  compiled = Compiled(grid, network, "", {}, [Leaf("model.a", 2**30, (), ())], 1.0, problem)
  assert explain.wanted(compiled) == 41 * 2**30
  found = explain.changes(e, grid, compiled)
  assert all(change.memory <= grid.chip.hbm for change in found)
  fewest = [c.settings["microbatches"] for c in found if set(c.settings) == {"microbatches"}]
  assert fewest == [4]  # A quarter of what is not state is what first fits.
  assert [c.slower for c in found] == sorted(c.slower for c in found)
  e.model.remat = "attention"
  e.model.layers = 64  # So that what is kept is nearly all.
  assert "--model.offload input attention" in [c.line() for c in explain.changes(e, grid, compiled)]


def test_the_largest_arrays_of_a_step_are_named_by_their_part_of_the_model(grid):
  e = study()
  e.mesh = Mesh(fsdp=4, tensor=2)
  scores = next(t for t in explain.largest(e, grid, few=3) if t.where == "block0.attention")
  # Of a block of blockwise attention: rows, kv heads here, their queries' heads, queries, keys.
  assert scores.shape == "float32[4,1,2,128,256]"
  assert scores.bytes == 4 * 2 * 128 * 256 * 4 and "exp" in scores.made_by


def test_what_is_looked_up_counts_as_one_chip_holds_it(grid):
  e = study()
  e.mesh = Mesh(fsdp=8)
  embed = [t for t in explain.largest(e, grid, few=1000) if t.where == "embed"]
  rows = e.batch // 8 * e.data.seq
  assert max(t.bytes for t in embed) <= max(rows, e.model.vocab) * e.model.dim * 4
