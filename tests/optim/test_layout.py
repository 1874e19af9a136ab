import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.mesh import Mesh
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.layout import TABLES, Layout, is_matrix, layout, map_layers, spread
from bigtrain.optim.muon import Muon
from bigtrain.optim.soap import SOAP


def of(name, *shape):
  found = []
  map_layers(lambda at, w: found.append(at), {name: jnp.zeros(shape)})
  return found[0]


@pytest.mark.parametrize(
  ("name", "shape", "wanted", "sides"),
  [
    ("up_DF", (8, 16), Layout(0, 1), (8, 16)),
    ("down_FD", (5, 16, 8), Layout(1, 1), (16, 8)),
    ("q_DKGH", (5, 8, 2, 3, 4), Layout(1, 1), (8, 24)),
    ("o_KGHD", (5, 2, 3, 4, 8), Layout(1, 3), (24, 8)),
    ("embed_VD", (50, 8), Layout(0, 1), (50, 8)),
    ("down_EFD", (5, 3, 16, 8), Layout(2, 1), (16, 8)),
    ("k_LKN", (5, 8, 2, 3), Layout(1, 1), (8, 6)),
    ("kernel", (3, 3, 8, 16), Layout(0, 3), (72, 16)),
    ("kernel", (8, 16), Layout(0, 1), (8, 16)),
  ],
)
def test_the_letters_of_a_name_tell_layers_rows_and_columns(name, shape, wanted, sides):
  assert of(name, *shape) == wanted
  assert wanted.sides(jnp.zeros(shape)) == sides


@pytest.mark.parametrize(
  ("name", "shape", "stack"),
  [("bias_KGH", (5, 2, 3, 4), 1), ("scale_D", (5, 8), 1), ("bias", (8,), 0), ("scale_D", (8,), 0)],
)
def test_biases_and_scales_are_vectors(name, shape, stack):
  assert of(name, *shape) == Layout(stack, 0)


def test_a_bias_in_the_name_of_a_module_makes_no_vector_of_its_matrix():
  path = (jax.tree_util.GetAttrKey("relative_bias"), jax.tree_util.GetAttrKey("table_ND"))
  assert layout(path, jnp.zeros((32, 8))) == Layout(0, 1)


@pytest.mark.parametrize("layers", [1, 3, 8, 11])
def test_every_layer_is_whole_on_one_device_and_comes_back_to_its_place(layers):
  x = np.random.default_rng(0).normal(size=(layers, 4, 6)).astype(np.float32)

  def inverse(stack):
    assert len(stack) == -(-layers // 8) and stack.shape[1:] == (4, 6)
    return stack @ jnp.swapaxes(stack, 1, 2), stack

  with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()):
    placed = jax.device_put(x, jax.P(None, "fsdp", "tensor"))
    gram, same = jax.jit(lambda x: spread(inverse, (x, x), x))(placed)
    assert gram.sharding == same.sharding == placed.sharding
  np.testing.assert_allclose(gram, x @ x.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(same, x)


@pytest.mark.parametrize("letters", ["DF", "FD", "DKGH", "KGHD", "DM"])
def test_hidden_matrices_are_not_spared(letters):
  path = (jax.tree_util.GetAttrKey("transformer"), jax.tree_util.GetAttrKey(f"w_{letters}"))
  assert is_matrix(path, jnp.zeros((2,) * len(letters)), TABLES)


@pytest.mark.parametrize(
  "name",
  (
    *("embed_VD", "output_table_VD", "position_TD", "type_YD", "head_DC", "patch_PD"),
    *("class_QD", "classes_MC", "next_MC", "query_QD", "embedding"),
  ),
)
def test_look_up_tables_and_what_meets_inputs_and_outputs_are_spared(name):
  assert not is_matrix((jax.tree_util.GetAttrKey(name),), jnp.zeros((4, 4)), TABLES)


@pytest.mark.parametrize("optimizer", [Muon, SOAP, Adafactor])
def test_an_expert_is_a_matrix_of_its_own(optimizer):
  r = np.random.default_rng(0)
  w, *gradients = (jnp.float32(r.normal(size=(2, 3, 4, 6))) for _ in range(4))
  tx = optimizer(lr=0.1, clip=None).make(10)

  @jax.jit
  def last(params, *gradients):
    state, updates = tx.init(params), None
    for gradient in gradients:
      updates, state = tx.update(gradient, state, params)
    return updates

  together = last({"up_EDF": w}, *({"up_EDF": g} for g in gradients))["up_EDF"]
  alone = last({"up_DF": w[1, 2]}, *({"up_DF": g[1, 2]} for g in gradients))["up_DF"]
  np.testing.assert_allclose(together[1, 2], alone, rtol=1e-3, atol=1e-6)
