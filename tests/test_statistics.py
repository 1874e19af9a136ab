"""Statistics of layers: named by depth, equal to those of a plain reference, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding, taps
from bigtrain.experiment import Logging
from bigtrain.kernels.attention import Tokens
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.position import lookup
from bigtrain.models.transformer import BlockConfig
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.program import Program
from bigtrain.state import combine
from bigtrain.statistics import by_layer, sizes
from bigtrain.train import train
from tests import classes, packed
from tests.interop import test_nnx_module
from tests.objectives import test_masked_lm, test_span_corruption


def experiment(**fields):
  """A first block and two repeats of two, on plain embeddings; without dropout, whose key differs
  by microbatch."""
  block = BlockConfig(
    attention=AttentionConfig(heads=2, bias=True),
    feed_forward=FeedForwardConfig(hidden=16, activation="relu", bias=True),
  )
  model = {
    "first": (block,),
    "pattern": (block, block),
    "layers": 5,
    "dropout": 0.0,
    "shift": False,
  }
  fields = {
    "optimizer": SGD(lr=0.1, schedule=Constant(warmup=0), momentum=0.0),
    "batch": 16,
  } | fields
  return packed.experiment(model=model, **fields)


def statistics(e, state, *, meshed: bool) -> dict[str, float]:
  """Those of the first step."""
  mesh = e.mesh.make() if meshed else None
  program = Program(e, mesh)
  batch = e.data.make(e.seed).batch(0, e.batch)
  with packed.in_mesh(mesh):
    if meshed:
      place = jax.tree.map(lambda x: x.sharding, program.abstract())
      state, batch = jax.device_put(state, place), jax.device_put(batch, sharding.batch_sharding())
    step = jax.jit(lambda *args: program.step(*args, statistics=True)[1]["layers"])
    return by_layer(jax.device_get(step(state, batch)))


@pytest.fixture(scope="module")
def alone():
  e = experiment()
  state = packed.start(e)
  return state, statistics(e, state, meshed=False)


def test_every_layer_is_named_by_its_depth_and_has_every_statistic(alone):
  _, found = alone
  layers = [f"transformer.{i:02}" for i in range(5)]
  for layer in layers:
    assert f"output/{layer}" in found
    for part in ("attention", "feed_forward"):
      assert {f"{of}/{layer}.{part}" for of in ("gradient", "parameter", "update")} <= found.keys()
    assert {f"score_max/{layer}.attention", f"entropy/{layer}.attention"} <= found.keys()
    assert f"dead/{layer}.feed_forward" in found
  assert {f"{of}/embed_VD" for of in ("gradient", "parameter", "update")} <= found.keys()
  assert len([name for name in found if name.startswith("output/")]) == len(layers)


def test_sizes_are_those_of_each_layers_arrays(alone):
  state, found = alone
  # Segment 0 is the first block; segment 1 holds two blocks over two repeats: layers 1 to 4.
  segments = state.model.transformer.segments
  for depth, (i, j, repeat) in enumerate([(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]):
    leaves = [np.asarray(x, np.float64)[repeat] for x in jax.tree.leaves(segments[i][j].attention)]
    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    wanted = np.sqrt(np.mean(flat**2))
    assert found[f"parameter/transformer.{depth:02}.attention"] == pytest.approx(wanted, rel=1e-5)
  gradient, update = (found[f"{of}/transformer.03.feed_forward"] for of in ("gradient", "update"))
  clip = min(1.0, 1.0 / global_norm(state))
  assert update == pytest.approx(0.1 * clip * gradient, rel=1e-4)


def global_norm(state) -> float:
  e = experiment()
  batch = e.data.make(e.seed).batch(0, e.batch)
  _, metrics = jax.jit(Program(e, None).step)(state, batch)
  return float(metrics["gradient_norm"])


def test_the_first_layers_output_is_what_it_gives_when_called_alone(alone):
  state, found = alone
  e = experiment()
  batch = e.data.make(e.seed).batch(0, e.batch)
  model = combine(state.model, state.variables)
  layer = jax.tree.map(lambda w: jnp.asarray(w)[0], model.transformer.segments[0][0])
  x_BTD = lookup(jnp.asarray(model.embed_VD.value), batch["tokens"], jnp.float32)
  x_BTD, _ = layer(x_BTD, Tokens(batch["positions"], batch["segments"]))
  wanted = np.sqrt(np.mean(np.square(np.asarray(x_BTD, np.float64))))
  assert found["output/transformer.00"] == pytest.approx(wanted, rel=1e-5)


def test_silent_units_are_dead_and_uniform_attention_has_the_entropy_of_what_is_visible():
  e = experiment()
  state = packed.start(e)
  block = state.model.transformer.segments[0][0]
  bias = np.zeros((1, 16), np.float32)
  bias[0, :4] = -1e6
  block.feed_forward.up_bias_F.value = bias
  for name in ("q_DKGH", "q_bias_KGH"):
    weight = getattr(block.attention, name)
    weight.value = np.zeros_like(weight.value)
  found = statistics(e, state, meshed=False)
  assert found["dead/transformer.00.feed_forward"] == pytest.approx(4 / 16)
  assert found["score_max/transformer.00.attention"] == 0
  wanted = entropy(e.data.make(e.seed).batch(0, e.batch))
  assert found["entropy/transformer.00.attention"] == pytest.approx(wanted, rel=1e-4)


def entropy(batch) -> float:
  """The mean of log(number of visible positions), counted one by one."""
  logs = []
  for segments in batch["segments"]:
    for t in range(len(segments)):
      visible = (segments == segments[t]) & (np.arange(len(segments)) <= t)
      logs.append(np.log(visible.sum()))
  return float(np.mean(logs))


@pytest.mark.parametrize(
  "fields", [{"microbatches": 4}, {"mesh": Mesh(data=2, fsdp=2, tensor=2)}], ids=["parts", "mesh"]
)
def test_statistics_are_the_same_on_a_mesh_and_of_microbatches(alone, fields):
  state, wanted = alone
  got = statistics(experiment(**fields), state, meshed="mesh" in fields)
  assert got.keys() == wanted.keys()
  for name, value in wanted.items():
    assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_a_run_records_statistics_at_their_interval_and_trains_the_same(tmp_path):
  fields = {"steps": 4, "batch": 8, "mesh": Mesh(data=8, fsdp=1)}
  with_them = experiment(logging=Logging(every=1, layers_every=2, tensorboard=False), **fields)
  without = experiment(logging=Logging(every=1, layers_every=0, tensorboard=False), **fields)
  a, b = train(with_them, tmp_path / "a", quiet=True), train(without, tmp_path / "b", quiet=True)
  assert a.layers["step"].tolist() == [2, 4] and not b.layers
  assert np.all(a.layers["gradient/transformer.04.attention"] > 0)
  np.testing.assert_allclose(a.metrics["loss"], b.metrics["loss"], rtol=1e-5)


def test_a_unit_is_dead_only_if_it_is_so_in_every_microbatch():
  masks = jnp.array([[True, True, False, True], [True, False, True, True]])
  found = taps.over_microbatches({"dead/a": masks, "dead/stack": masks[:, None], "b": masks * 1.0})
  assert {k: v.tolist() for k, v in taps.values(found).items()} == {
    "dead/a": 0.5,
    "dead/stack": [0.5],
    "b": [1.0, 0.5, 0.5, 1.0],
  }


def test_means_of_microbatches_are_weighted_and_roots_come_last():
  sums, weights = jnp.array([6.0, 0.0]), jnp.array([2.0, 1.0])
  found = {"a": taps.Mean(sums, weights), "b": taps.Mean(sums, weights, root=True)}
  of_all = taps.values(taps.over_microbatches(found))
  assert {k: float(v) for k, v in of_all.items()} == {"a": 2.0, "b": pytest.approx(2**0.5)}


def test_means_of_devices_are_weighted_also_where_all_have_the_same_weights():
  """Two devices have rows of other weights; two more have other heads of the same rows."""

  def local(x_BK, weight_B):
    mean = taps.Mean((x_BK * weight_B[:, None]).mean(1).sum(), weight_B.sum())
    return taps.values(taps.over_devices({"a": mean}))["a"]

  x_BK, weight_B = np.arange(8.0).reshape(4, 2), np.array([1.0, 1.0, 1.0, 0.0])
  with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])):
    specs = jax.P("data", "tensor"), jax.P("data")
    laid = [jax.sharding.reshard(a, spec) for a, spec in zip((x_BK, weight_B), specs, strict=True)]
    found = jax.jit(jax.shard_map(local, in_specs=specs, out_specs=jax.P()))(*laid)
  np.testing.assert_allclose(found, np.average(x_BK.mean(1), weights=weight_B), rtol=1e-6)


def test_nothing_is_computed_where_nobody_collects():
  taps.tap("never", lambda: 1 / 0)
  result, found = taps.collected(lambda: taps.tap("never", lambda: 1 / 0))()
  assert (result, found) == (None, {})


def test_sizes_of_leaves_outside_any_layer_go_by_their_own_name():
  found = sizes(
    gradient={"a": jnp.full((2, 2), 3.0), "b": {"c": jnp.full(4, 2.0), "d": jnp.zeros(4)}}
  )
  assert {k: float(v) for k, v in found.items()} == {
    "gradient/a": 3.0,
    "gradient/b": pytest.approx(2**0.5),
  }


FAMILIES = {
  "mlp": lambda: classes.experiment(classes.MODELS["mlp"]),
  "decoder": packed.experiment,
  "bert": test_masked_lm.experiment,
  "vit": lambda: classes.experiment(classes.MODELS["vit"]),
  "t5": test_span_corruption.experiment,
  "own": test_nnx_module.experiment,
}
TAPPED = {
  "mlp": {"output", "dead"},
  "decoder": {"output", "dead", "score_max", "entropy"},
  "bert": {"output", "dead", "score_max", "entropy"},
  "vit": {"output", "dead", "score_max", "entropy"},
  "t5": {"output", "dead", "score_max", "entropy"},
  "own": set(),  # Someone's own module reports nothing of itself.
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reports_and_what_its_layers_tap_goes_by_the_path_of_their_weights(family):
  e = FAMILIES[family]()
  program = Program(e, None)
  batch = {k: jnp.zeros(x.shape, x.dtype) for k, x in e.data.make(0).spec(e.batch).items()}
  step = lambda state, batch: program.step(state, batch, statistics=True)[1]["layers"]
  found = jax.eval_shape(step, program.abstract(), batch)
  names = by_layer({k: np.zeros(x.shape) for k, x in found.items()})
  of = lambda statistic: {n.partition("/")[2] for n in names if n.startswith(f"{statistic}/")}
  assert of("gradient") and of("gradient") == of("parameter") == of("update")
  tapped = {name.partition("/")[0] for name in names} - {"gradient", "parameter", "update"}
  assert tapped == TAPPED[family]
  for layer in set.union(set(), *map(of, tapped)):
    assert any(f"{at}.".startswith(f"{layer}.") for at in of("gradient")), layer


def test_the_size_of_a_gradient_whose_squares_are_below_float32_is_right():
  tiny = {"a": {"w": jnp.full((2, 3), 3e-25), "b": jnp.zeros(3)}, "c": jnp.zeros(2)}
  found = jax.jit(lambda tree: sizes(gradient=tree))(tiny)
  assert float(found["gradient/a"]) == pytest.approx(3e-25 * (2 / 3) ** 0.5, rel=1e-5)
  assert float(found["gradient/c"]) == 0
  assert np.isnan(float(sizes(gradient={"w": jnp.array([1.0, np.nan])})["gradient/w"]))
