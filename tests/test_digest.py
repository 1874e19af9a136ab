"""Digests: the same in numpy and on any mesh, by a plain loop, and changed by any bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bigtrain import Mesh, digest

DTYPES = (np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, bool, ml_dtypes.float8_e4m3fn)


def array(dtype, *shape):
  return (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)


def mixed(word: int) -> int:
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    word = ((word ^ word >> shift) * factor) % 2**32
  return word ^ word >> 16


def plainly(x: np.ndarray) -> list[int]:
  """By the definition, a word at a time."""
  size, kind = x.dtype.itemsize, f"u{min(x.dtype.itemsize, 4)}"
  rows = x.shape[0] if x.ndim else 1
  words = np.frombuffer(x.tobytes(), kind).reshape(rows, -1)
  assert size <= 4 or words.size == 2 * x.size
  hashes = [
    [mixed(int(w) ^ mixed(i * words.shape[1] + j)) for j, w in enumerate(row)]
    for i, row in enumerate(words)
  ]
  per = -(-rows // 16)
  return [sum(map(sum, hashes[i : i + per])) % 2**32 for i in range(0, rows, per)]


def on_host(x: np.ndarray) -> list[int]:
  return digest.of_block(x, x.shape, (0,) * x.ndim).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (33,), (3, 4), (40, 3, 2)])
def test_host_and_device_agree_with_the_definition(shape):
  for dtype in DTYPES:
    x = array(dtype, *shape)
    known = plainly(x)
    assert on_host(x) == known, dtype
    assert jax.jit(digest.of_array)(x).tolist() == known, dtype


def test_numbers_of_eight_bytes():
  x = array(np.float64, 5, 3)
  assert on_host(x) == plainly(x)
  with jax.enable_x64(True):
    assert jax.jit(digest.of_array)(x).tolist() == plainly(x)


@pytest.mark.parametrize("block", [1, 7, 1 << 30])
def test_blocks_however_cut_add_up(monkeypatch, block):
  monkeypatch.setattr(digest, "BLOCK", block)
  x = array(np.float32, 37, 6, 5)
  total = np.zeros_like(digest.of_block(x[:1], x.shape, (0, 0, 0)))
  for rows in ((0, 10), (10, 37)):
    for columns in ((0, 1), (1, 6)):
      total += digest.of_block(x[slice(*rows), slice(*columns)], x.shape, (rows[0], columns[0], 0))
  assert total.tolist() == plainly(x)


@pytest.mark.parametrize(
  "spec", [jax.P(), jax.P("fsdp", "tensor"), jax.P(("data", "fsdp"), "tensor"), jax.P(None, "data")]
)
@pytest.mark.parametrize("little", [0, 1 << 30])
def test_a_digest_is_the_same_on_any_mesh(monkeypatch, spec, little):
  monkeypatch.setattr(digest, "LITTLE", little)
  x = array(np.float32, 32, 8)
  with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()) as _:
    placed = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))
    assert digest.of_arrays({"x": placed, "y": jnp.float32(x[0, 0])}) == {
      "x": plainly(x),
      "y": plainly(x[0, 0]),
    }


def test_every_bit_and_every_place_counts():
  x = array(np.float32, 20, 3)
  known, bits = on_host(x), x.view(np.uint32)
  for at in np.ndindex(*x.shape):
    for bit in (0, 13, 31):
      bits[at] ^= np.uint32(1 << bit)
      wrong = [i for i, (a, b) in enumerate(zip(on_host(x), known, strict=True)) if a != b]
      assert wrong == [at[0] // 2]
      bits[at] ^= np.uint32(1 << bit)
  assert on_host(x[::-1].copy()) != known and on_host(x[:, ::-1].copy()) != known
  assert len({tuple(on_host(np.zeros((n, 4), np.float32))) for n in range(1, 50)}) == 49
