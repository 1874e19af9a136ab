"""Every optimizer trains a small decoder on a mesh, and goes on exactly from a checkpoint."""

import dataclasses

import chex
import jax
import optax
import pytest

from bigtrain import Checkpoints
from bigtrain.checkpoint import Store
from bigtrain.data.feed import put
from bigtrain.mesh import Mesh
from bigtrain.program import Program
from bigtrain.run_directory import RunDirectory
from bigtrain.sharding import batch_sharding
from tests import packed
from tests.optim.test_updates import CASES

VARIANTS = {
  "nesterov",
  "rmsprop_momentum",
  "adafactor_plain",
  "muon_rms",
}  # Their state is others'.


@pytest.fixture(scope="module")
def decoder():
  """On a mesh: the experiment, its first weights, and the compiled gradient of one batch."""
  e = packed.experiment(mesh=Mesh(data=2, fsdp=2, tensor=2), model={"layers": 1, "dropout": 0.0})
  start = packed.start(e).model
  with jax.set_mesh(mesh := e.mesh.make()):
    program = Program(e, mesh)
    state = program.abstract()
    model = jax.device_put(start, jax.tree.map(lambda x: x.sharding, state.model))
    batch = put(lambda rows: e.data.make(0).batch(0, e.batch, rows), e.batch, batch_sharding())

    @jax.jit
    def gradient(model):
      gradient, output, _ = program.gradient(model, state.variables, batch, None)
      return gradient, output.loss_sum / output.weight

    yield e, model, gradient.lower(model).compile()


@pytest.mark.parametrize("name", sorted(CASES.keys() - VARIANTS))
def test_a_run_learns_and_goes_on_from_a_checkpoint_exactly(name, decoder, tmp_path):
  e, model, gradient = decoder
  tx = dataclasses.replace(CASES[name][0], lr=0.02, clip=1.0).make(steps=4)
  state = {"model": model, "optimizer": jax.jit(tx.init)(model)}
  check_shardings(state)

  @jax.jit
  def follow(state, gradient):
    updates, optimizer = tx.update(gradient, state["optimizer"], state["model"])
    return {"model": optax.apply_updates(state["model"], updates), "optimizer": optimizer}

  states, losses = [state], []
  for _ in range(4):
    g, loss = gradient(states[-1]["model"])
    states.append(follow(states[-1], g))
    losses.append(float(loss))
  assert losses[-1] < losses[0], losses
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  with Store(RunDirectory(tmp_path).checkpoints, Checkpoints()) as store:
    store.save(2, states[2], e)
    store.wait()
    state = store.restore(2, jax.tree.map(like, states[2]))
  for _ in range(2):
    state = follow(state, gradient(state["model"])[0])
  chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(states[4]))


def check_shardings(state):
  """What an optimizer keeps in the shape of a parameter lies where the parameter lies."""
  parameters = {jax.tree_util.keystr(p): w for p, w in jax.tree.leaves_with_path(state["model"])}
  for path, leaf in jax.tree.leaves_with_path(state["optimizer"]):
    for name, w in parameters.items():
      if jax.tree_util.keystr(path).endswith(name) and w.shape == leaf.shape:
        assert jax.typeof(leaf) == jax.typeof(w), name
