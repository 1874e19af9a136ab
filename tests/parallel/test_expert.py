"""What comes back from the experts equals a loop over tokens, in float64, forward and backward.

Dims: B batch, T position, D model, F hidden, X expert, A choices of a token.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.mesh import Mesh
from bigtrain.models.moe import _experts
from bigtrain.parallel import expert
from bigtrain.parallel.expert import Capacity, Dropless, through_experts
from tests import packed

B, T, D, F, X, A = 8, 6, 8, 4, 8, 2
LETTERS = ("BTD", "BTA", "BTA", "EDF", "EDF", "EFD", "BTD")


def arrays():
  """Tokens, weights and choices, three kinds of matrices, a cotangent. Experts are uneven."""
  r = np.random.default_rng(0)
  popular = np.linspace(4, 1, X) / np.linspace(4, 1, X).sum()
  choice = [r.choice(X, A, replace=False, p=popular) for _ in range(B * T)]
  choice = np.array(choice).reshape(B, T, A)
  choice[1, 4:], choice[6, :] = X, X  # Padding.
  shapes = ((B, T, D), (B, T, A)), ((X, D, F), (X, D, F), (X, F, D), (B, T, D))
  (x, weights), rest = ([r.normal(size=shape) for shape in group] for group in shapes)
  return x, weights, choice.astype(np.int32), *rest


def kept_by_row(choice, C: int):
  """First choices come before second ones, and then earlier tokens."""
  kept = np.zeros((B, T, A), bool)
  for row in range(B):
    room = dict.fromkeys(range(X), C)
    for a, t in itertools.product(range(A), range(T)):
      e = choice[row, t, a]
      kept[row, t, a] = e < X and room[e] > 0
      room[e] = room.get(e, 0) - 1
  return kept


def kept_by_device(choice, n: int, room: int, pairs: bool):
  """Of `n` devices along the axis each has `room` for all that comes, or for what comes of each."""
  kept, rows = np.zeros((B, T, A), bool), B // 8
  for group in range(8 // n):
    left = {}
    for device in range(n):
      first = (group * n + device) * rows
      own = [
        (choice[b, t, a], a, b, t)
        for a, b, t in itertools.product(range(A), range(first, first + rows), range(T))
      ]
      for e, a, b, t in sorted(own):
        if e < X:
          key = (device if pairs else 0, e // (X // n))
          left[key] = left.get(key, room) - 1
          kept[b, t, a] = left[key] >= 0
  return kept


def loop(x, weights, choice, up, gate, down, dy, kept):
  """The result, and the gradients of x, weights and matrices."""
  y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
  dup, dgate, ddown = (np.zeros_like(w) for w in (up, gate, down))
  for b, t, a in zip(*np.nonzero(kept), strict=True):
    e, row = choice[b, t, a], x[b, t]
    p, q = row @ up[e], row @ gate[e]
    s = 1 / (1 + np.exp(-q))
    h, out = q * s * p, (q * s * p) @ down[e]
    y[b, t] += weights[b, t, a] * out
    dweights[b, t, a] = dy[b, t] @ out
    dout = weights[b, t, a] * dy[b, t]
    dh = down[e] @ dout
    dp, dq = dh * q * s, dh * p * (s + q * s * (1 - s))
    ddown[e] += np.outer(h, dout)
    dup[e] += np.outer(row, dp)
    dgate[e] += np.outer(row, dq)
    dx[b, t] += up[e] @ dp + gate[e] @ dq
  return y, dx, dweights, dup, dgate, ddown


def run(dispatch, mesh: Mesh | None):
  """The same by through_experts, and how many choices it left out."""

  def compute(x, weights, choice, up, gate, down, dy):
    def forward(x, weights, stored):
      over = [axis for axis in sharding.split_over(x, 2) if axis != "expert"]
      w = [sharding.use(w, dims, over=over) for w, dims in zip(stored, LETTERS[3:6], strict=True)]
      network = functools.partial(_experts, jax.nn.silu)
      given = (sharding.shared(x), sharding.shared(weights), choice)
      return through_experts(dispatch, network, *given, X, w)

    y, back, dropped = jax.vjp(forward, x, weights, [up, gate, down], has_aux=True)
    dx, dweights, dw = back(dy)
    return (y, dx, dweights, *dw), dropped

  with packed.in_mesh(mesh.make() if mesh else None):
    place = lambda dims: sharding.weight(dims) if "E" in dims else sharding.act(dims)
    put = lambda a, dims: jnp.asarray(
      a,
      a.dtype if a.dtype == np.int32 else np.float32,
      device=None
      if mesh is None
      else jax.sharding.NamedSharding(jax.sharding.get_mesh(), place(dims)),
    )
    given = [put(a, dims) for a, dims in zip(arrays(), LETTERS, strict=True)]
    return jax.device_get(jax.jit(compute)(*given))


def check(found, kept):
  got, dropped = found
  wanted = loop(*arrays(), kept)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert dropped == (arrays()[2] < X).sum() - kept.sum()


EXPERT4, TENSOR = Mesh(expert=4, fsdp=2), Mesh(expert=2, tensor=2, fsdp=2)
ALL = arrays()[2] < X


@pytest.mark.parametrize(
  ("dispatch", "mesh"),
  [
    (Dropless(), None),
    (Dropless(), EXPERT4),
    (Dropless(exchange="ragged"), EXPERT4),
    (Dropless(exchange="ragged"), TENSOR),
    (Dropless(), Mesh(fsdp=4, tensor=2)),
  ],
)
def test_every_token_goes_through_its_experts(dispatch, mesh):
  check(run(dispatch, mesh), ALL)


@pytest.mark.parametrize("exchange", ["ragged", "all_to_all"])
def test_every_token_goes_through_the_only_expert_of_a_device(exchange):
  check(run(Dropless(buffer=8.0, exchange=exchange), Mesh(expert=8)), ALL)


@pytest.mark.parametrize("mesh", [None, EXPERT4, TENSOR])
def test_an_expert_that_is_full_leaves_out_what_comes_later_in_the_row(mesh):
  kept = kept_by_row(arrays()[2], math.ceil(1.2 * T * A / X))
  assert 0.1 < 1 - kept.sum() / ALL.sum() < 0.5
  check(run(Capacity(factor=1.2), mesh), kept)


@pytest.mark.parametrize(("exchange", "room"), [("all_to_all", 4), ("ragged", 12)])
def test_a_device_that_is_full_leaves_out_what_comes_later(exchange, room):
  buffer = {"all_to_all": 4 * room / (T * A), "ragged": room / (T * A)}[exchange]
  kept = kept_by_device(arrays()[2], 4, room, pairs=exchange == "all_to_all")
  assert 0.02 < 1 - kept.sum() / ALL.sum() < 0.5
  check(run(Dropless(buffer=buffer, exchange=exchange), EXPERT4), kept)


def test_a_token_that_is_lost_on_the_way_is_noticed(monkeypatch):
  exchange = expert._all_to_all
  monkeypatch.setattr(expert, "_all_to_all", lambda x, dim: exchange(x.at[0, 0].set(0), dim))
  with pytest.raises(AssertionError, match="Not equal"):
    check(run(Dropless(), EXPERT4), ALL)
