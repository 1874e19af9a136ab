"""Attention in blocks against the formula in float64: values, gradients, bits, meshes, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.kernels.attention import Form, blockwise, plain
from bigtrain.mesh import Mesh
from tests.kernels import attention
from tests.kernels.attention import FORMS, distances, exact, gradients

T = 14  # Two blocks of queries and of keys, the last of each not full.
MODES = ["written out", "in loops"]


@pytest.fixture
def small_blocks(monkeypatch):
  def use(mode):
    monkeypatch.setattr(blockwise, "QUERIES", 8)
    monkeypatch.setattr(blockwise, "KEYS", 8)
    monkeypatch.setattr(blockwise, "UNROLLED", T if mode == "written out" else 0)

  return use


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_blocks_equal_the_formula_on_packed_rows(small_blocks, form, mode):
  small_blocks(mode)
  c = attention.call(FORMS[form], T, bias=form != "causal")
  assert max(distances(gradients(blockwise.attend, c), exact(c))) < 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_slot_gets_zeros_and_sends_no_gradient(small_blocks, mode):
  small_blocks(mode)
  c = attention.call(FORMS["causal"], T, segments=False)
  out, *grads = gradients(blockwise.attend, c)
  assert max(distances((out, *grads), exact(c))) < 2e-6
  empty = ~attention.mask(c).any(-1)
  assert empty.any() and not np.any(out[empty]) and not np.any(grads[0][empty])


def test_bfloat16_is_as_near_as_its_rounding():
  c = attention.call(FORMS["soft cap"], T, dtype=jnp.bfloat16)
  got = gradients(blockwise.attend, c)
  assert got[0].dtype == got[1].dtype == jnp.bfloat16
  assert max(distances(got, exact(c))) < 1e-2


@functools.cache
def dropped(mesh: Mesh | None):
  """A call with dropout and values by which the weights can be read, and its gradients."""
  c = attention.call(FORMS["causal"], T, bias=True)
  eye_BSKH = np.broadcast_to(np.eye(T, dtype=np.float32)[:, None], (attention.B, T, attention.K, T))
  widen = lambda x: np.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, T - attention.H),))
  c = c._replace(v_BSKH=eye_BSKH, q_BTKGH=widen(c.q_BTKGH), k_BSKH=widen(c.k_BSKH))
  c = c._replace(dropout=0.25, key=jax.random.key(3))
  if mesh is None:
    return c, gradients(blockwise.attend, c)
  with jax.set_mesh(mesh.make()):
    return c, jax.device_get(gradients(blockwise.attend, placed(c)))


def placed(c):
  """The arrays of a call where the mesh in force has them."""
  lay = lambda x, dims: jax.device_put(x, sharding.act(dims))
  tokens = jax.tree.map(lambda x: lay(x, "BT"), c.queries)
  return c._replace(
    q_BTKGH=lay(c.q_BTKGH, "BTKGH"),
    k_BSKH=lay(c.k_BSKH, "BSKH"),
    v_BSKH=lay(c.v_BSKH, "BSKH"),
    queries=tokens,
    keys=tokens,
    bias_KGP=lay(c.bias_KGP, "KGP"),
  )


def test_dropout_drops_the_same_weights_forward_and_backward(small_blocks):
  small_blocks("written out")
  c, got = dropped(None)
  weights_BKGTS = np.transpose(got[0], (0, 2, 3, 1, 4))
  seen = np.broadcast_to(attention.mask(c)[:, None, None], weights_BKGTS.shape)
  kept = weights_BKGTS > 0
  share = kept[seen].mean()
  assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / seen.sum())
  assert max(distances(got, exact(c, kept / 0.75))) < 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_mesh_changes_no_number_and_no_dropped_weight(small_blocks, mode):
  small_blocks(mode)
  dropped.cache_clear()
  (_, alone), (_, spread) = (
    dropped(None),
    dropped(Mesh(data=2, fsdp=1, tensor=2, context=1, expert=2)),
  )
  assert max(distances(spread, alone)) < 1e-6


def test_memory_grows_with_the_length_and_not_with_its_square():
  def temporary(length, attend):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    tokens = attention.Tokens(np.zeros((1, length), np.int32))
    c = attention.Call(*(None,) * 3, tokens, tokens, Form(causal=True, aligned=True))

    def loss(q, k, v):
      return attend(c._replace(q_BTKGH=q, k_BSKH=k, v_BSKH=v)).sum()

    arrays = shape(1, length, 2, 2, 16), shape(1, length, 2, 16), shape(1, length, 2, 16)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = (temporary(n, blockwise.attend) for n in (4096, 16384))
  assert long < 4.2 * short
  assert temporary(4096, plain.attend) > 10 * short


def test_blocks_that_nobody_sees_are_not_computed(small_blocks):
  small_blocks("written out")

  def products(form):
    c = attention.call(form, T)
    run = lambda q: gradients(blockwise.attend, c._replace(q_BTKGH=q))
    return str(jax.make_jaxpr(run)(c.q_BTKGH)).count("dot_general")

  assert products(Form(causal=True)) == 4 * 7
  assert products(FORMS["causal"]) == 3 * 7
  assert products(FORMS["window"]) == 3 * 7


def test_what_is_kept_by_name_is_not_computed_again(small_blocks):
  small_blocks("written out")
  c = attention.call(FORMS["causal"], T)

  def products(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    run = jax.checkpoint(lambda q: blockwise.attend(c._replace(q_BTKGH=q)).sum(), policy=policy)
    return str(jax.make_jaxpr(jax.grad(run))(c.q_BTKGH)).count("dot_general")

  assert products("attention") + 3 * 2 == products() == 3 * 9
