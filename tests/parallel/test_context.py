"""Attention over rows that are cut equals that over whole rows, and so do its gradients.

Dims: B batch, T position, D model, K kv heads, G queries per kv head, H head, P distance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from bigtrain import sharding
from bigtrain.config import Refused
from bigtrain.kernels.attention import Call, Form, Tokens, attend
from bigtrain.mesh import Mesh
from bigtrain.parallel import blockwise, context, zigzag
from tests.collectives import collectives

B, T, K, G, H = 2, 32, 4, 3, 8
RING = Mesh(fsdp=1, context=4, tensor=2)
EXCHANGE = Mesh(fsdp=2, context=2, ulysses=True, tensor=2)
FORMS = {
  "causal": Form(causal=True),
  "windowed": Form(causal=True, window=6, softcap=2.0),
  "bidirectional": Form(causal=False),
}


def arguments() -> dict[str, np.ndarray]:
  """Packed rows: documents of unequal length, one over several cuts, and padding."""
  r = np.random.default_rng(0)
  draw = lambda *shape: r.normal(size=shape).astype(np.float32)
  segments_BT = np.repeat([[1, 2, 3, 0], [1, 2, 3, 4]], [3, 19, 8, 2], axis=1).astype(np.int32)
  segments_BT[1] = np.sort(r.integers(1, 4, T))
  starts_BT = np.array([[np.argmax(row == s) for s in row] for row in segments_BT])
  return {
    "segments": segments_BT,
    "positions": (np.arange(T) - starts_BT).astype(np.int32),
    "q": draw(B, T, K, G, H),
    "k": draw(B, T, K, H),
    "v": draw(B, T, K, H),
    "factor": draw(B, T, K, G, H) * (segments_BT > 0)[..., None, None, None],
  }


def loss(form: Form, arrays, bias_KGP=None):
  """A weighted sum of the outputs of tokens; what padding sees means nothing."""
  tokens = Tokens(arrays["positions"], arrays["segments"])
  y = attend(Call(arrays["q"], arrays["k"], arrays["v"], tokens, tokens, form, bias_KGP=bias_KGP))
  return (arrays["factor"] * y).sum(), y


def gradients(form: Form, arrays, bias_KGP=None):
  """Output, and the gradients of q, k, v and the bias."""
  parts = {name: arrays[name] for name in "qkv"}

  def of(parts, bias_KGP):
    return loss(form, arrays | parts, bias_KGP)

  found, y = jax.grad(of, argnums=(0, 1) if bias_KGP is not None else 0, has_aux=True)(
    parts, bias_KGP
  )
  return y, found


def compiled(mesh: jax.sharding.Mesh, form: Form, bias_KGP=None):
  """The same over rows that are cut: the compiled function, and its arguments."""
  order = zigzag.columns(T, mesh.shape["context"])
  names = {"q": "BTKGH", "factor": "BTKGH", "k": "BTKH", "v": "BTKH"}
  with sharding.rows(cut=True):
    place = lambda name: sharding.act(names.get(name, "BT"))
    arrays = {n: jax.device_put(x[:, order], place(n)) for n, x in arguments().items()}
    args = (arrays,) if bias_KGP is None else (arrays, bias_KGP)
    function = jax.jit(functools.partial(gradients, form)).lower(*args).compile()
  return function, args


def in_order(tree, mesh: jax.sharding.Mesh):
  back = np.argsort(zigzag.columns(T, mesh.shape["context"]))
  return jax.tree.map(lambda x: np.asarray(x)[:, back], tree)


def assert_close(got, wanted):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def of_tokens(y_BTKGH) -> np.ndarray:
  return np.asarray(y_BTKGH)[arguments()["segments"] > 0]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_ring_finds_what_one_device_finds(form, monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 2)  # Each piece of four positions is two blocks.
  y, found = jax.jit(functools.partial(gradients, form))(arguments())
  with jax.set_mesh(mesh := RING.make()):
    function, args = compiled(mesh, form)
    got_y, got = in_order(function(*args), mesh)
  assert_close((of_tokens(got_y), got), (of_tokens(y), found))
  moved = {(c.kind, c.axes) for c in collectives(function, mesh)}
  assert {kind for kind, _ in moved} == {"collective-permute"}, moved


def test_exchanged_heads_find_what_one_device_finds_biases_by_distance_included():
  form, r = FORMS["causal"], np.random.default_rng(1)
  bias_KGP = r.normal(size=(K, G, 2 * T - 1)).astype(np.float32)
  y, (found, dbias_KGP) = jax.jit(functools.partial(gradients, form))(arguments(), bias_KGP)
  with jax.set_mesh(mesh := EXCHANGE.make()):
    function, args = compiled(mesh, form, jax.device_put(bias_KGP, sharding.act("KGP")))
    got_y, (got, got_dbias_KGP) = function(*args)
    got_y, got = in_order((got_y, got), mesh)
  assert_close((of_tokens(got_y), got, got_dbias_KGP), (of_tokens(y), found, dbias_KGP))
  large = {c.kind for c in collectives(function, mesh) if c.elements > B * T}
  assert large <= {"all-to-all", "all-reduce"}, large  # The latter of the bias, which all share.


def test_parts_that_are_merged_equal_the_whole():
  arrays, form = arguments(), FORMS["causal"]
  tokens = Tokens(arrays["positions"], arrays["segments"])
  own = blockwise.Queries(arrays["q"], tokens)
  found = blockwise.nothing(jnp.asarray(arrays["q"]))
  for part in (slice(20, None), slice(0, 3), slice(3, 20)):
    there = jax.tree.map(lambda x, part=part: x[:, part], (arrays["k"], arrays["v"], tokens))
    found = blockwise.merged(found, blockwise.partial_attention(own, blockwise.Keys(*there), form))
  assert_close(of_tokens(found.out_BTKGH), of_tokens(loss(form, arrays)[1]))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_number_of_positions_that_is_prime_goes_in_long_blocks_too(form, monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 8)
  arrays = {name: x[:, :31] for name, x in arguments().items()}
  tokens = Tokens(arrays["positions"], arrays["segments"])
  own = blockwise.Queries(arrays["q"], tokens)
  there = blockwise.Keys(arrays["k"], arrays["v"], tokens)
  blocks = blockwise._blocks((own, there))
  assert {x.shape[::2] for x in jax.tree.leaves(blocks) if x.ndim == 3} == {(4, 8)}

  def partly(arrays):
    found = blockwise.partial_attention(own, there, form)
    sums = (arrays["factor"] * found.out_BTKGH).sum(-1)
    sent = blockwise.Sent(arrays["factor"], found.lse_BTKG, sums)
    return found.out_BTKGH, blockwise.partial_gradients(own, there, form, sent)

  y, found = jax.jit(partly)(arrays)
  wanted_y, wanted = gradients(form, arrays)
  of_real = lambda x: np.asarray(x)[arrays["segments"] > 0]
  assert_close((of_real(y), found), (of_real(wanted_y), tuple(wanted[name] for name in "qkv")))


@pytest.mark.parametrize("mesh", [RING, EXCHANGE], ids=["ring", "exchange"])
def test_a_cut_row_knows_its_neighbours_and_its_first_column(mesh):
  x_BTD = np.arange(B * T * 3, dtype=np.float32).reshape(B, T, 3) + 1
  with jax.set_mesh(mesh := mesh.make()), sharding.rows(cut=True):
    order = zigzag.columns(T, mesh.shape["context"])
    x = jax.device_put(x_BTD[:, order], sharding.act("BTD"))
    before, first = jax.jit(lambda x: (context.before(x), context.first(x)))(x)
  np.testing.assert_array_equal(first, x_BTD[:, 0])
  np.testing.assert_array_equal(in_order(before, mesh)[:, 1:], x_BTD[:, :-1])
  assert not in_order(before, mesh)[:, 0].any()


def test_a_batch_is_cut_into_what_each_device_holds_and_nothing_else_is():
  r = np.random.default_rng(0)
  batch = {"tokens": r.integers(0, 9, (B, T)), "labels": r.integers(0, 9, B)}
  with jax.set_mesh(mesh := RING.make()):
    batch = jax.device_put(batch, sharding.batch_sharding())
    with context.cut(batch) as parts:
      pass
  np.testing.assert_array_equal(in_order(parts["tokens"], mesh), batch["tokens"])
  assert parts["labels"] is batch["labels"]
  shard = parts["tokens"].addressable_shards[0].data
  np.testing.assert_array_equal(shard, np.asarray(batch["tokens"])[:, [0, 1, 2, 3, 28, 29, 30, 31]])


def test_memory_does_not_grow_with_the_square_of_a_piece_in_a_scan_over_layers(monkeypatch):
  """The tokens are those of every layer: what depends on them alone must not be made beforehand."""
  monkeypatch.setattr(blockwise, "BLOCK", 4)
  length = 512  # Pieces of 128: their masks would be larger than all queries.

  def loss(q, k, v, positions):
    attention = lambda q: attend(
      Call(q, k, v, Tokens(positions), Tokens(positions), FORMS["causal"])
    )
    layer = lambda q, _: (jax.checkpoint(attention)(q), None)
    return jax.lax.scan(layer, q, None, length=3)[0].sum()

  with jax.set_mesh(Mesh(fsdp=1, context=2).make(jax.devices()[:2])), sharding.rows(cut=True):
    put = lambda dims, *shape: jax.device_put(np.ones(shape, np.float32), sharding.act(dims))
    q, k = put("BTKGH", 1, length, 1, 1, 4), put("BTKH", 1, length, 1, 4)
    positions = put("BT", 1, length).astype(np.int32)
    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k, positions)
  assert max(_sizes(traced.jaxpr)) <= 3 * q.size  # The queries of three layers.


def _sizes(jaxpr):
  """Of all arrays in a jaxpr and those inside it."""
  for equation in jaxpr.eqns:
    yield from (getattr(v.aval, "size", 0) for v in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from _sizes(inner)


def test_attention_that_has_no_form_over_cut_rows_is_refused():
  arrays, tokens = arguments(), Tokens(arguments()["positions"])
  call = Call(arrays["q"], arrays["k"], arrays["v"], tokens, tokens, FORMS["causal"])
  with jax.set_mesh(RING.make()), sharding.rows(cut=True):
    with pytest.raises(Refused, match=r"attention.dropout is 0.1, but over mesh.context"):
      attend(call._replace(dropout=0.1, key=jax.random.key(0)))
    with pytest.raises(Refused, match=r"relative biases go by .* whole rows"):
      attend(call._replace(bias_KGP=np.zeros((K, G, 2 * T - 1), np.float32)))
