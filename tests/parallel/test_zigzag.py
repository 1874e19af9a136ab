"""The order of rows that are cut for a ring, and random bits in that order."""

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain import sharding
from bigtrain.dropout import dropout
from bigtrain.mesh import Mesh
from bigtrain.parallel import zigzag


def test_each_device_has_a_piece_from_the_front_and_its_mirror_image_from_the_back():
  assert zigzag.columns(16, 2).tolist() == [0, 1, 2, 3, 12, 13, 14, 15, *range(4, 12)]
  assert zigzag.columns(6, 1).tolist() == list(range(6))


def test_under_a_causal_mask_every_device_has_as_many_keys_to_look_at():
  keys = zigzag.columns(64, 4) + 1
  assert len(set(keys.reshape(4, -1).sum(1))) == 1


def test_dropout_of_cut_rows_has_the_bits_of_whole_rows():
  key, x_BTD = jax.random.key(3), np.ones((4, 16, 6), np.float32)
  whole_BTD = np.asarray(dropout(jnp.asarray(x_BTD), 0.3, key))
  mesh = Mesh(fsdp=2, context=2, tensor=2, sequence=True).make()
  with jax.set_mesh(mesh), sharding.rows(cut=True):
    dropped = jax.jit(lambda x_BTD: dropout(x_BTD, 0.3, key))
    cut_BTD = np.asarray(dropped(jax.device_put(x_BTD, sharding.act("BTD"))))
  np.testing.assert_array_equal(cut_BTD, whole_BTD[:, zigzag.columns(16, 2)])
  assert 0 < (whole_BTD == 0).mean() < 0.6


def test_elements_are_numbered_right_beyond_32_bits():
  a, b = [2**32 - 1, 2**32 - 7, 65_536, 65_535, 3], 2**31 + 12_345
  high, low = zigzag._product(jnp.asarray(a, jnp.uint32), b)
  found = [(int(x) << 32) + int(y) for x, y in zip(high, low, strict=True)]
  assert found == [n * b for n in a]
