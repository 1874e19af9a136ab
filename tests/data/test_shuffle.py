import numpy as np
import pytest

from bigtrain.data.shuffle import hashes, key_of, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 12, 100, 255, 256, 257, 4096, 99_991])
def test_permutation_is_a_bijection(n):
  assert np.array_equal(np.sort(permute(np.arange(n), n, key_of(n))), np.arange(n))


def test_permutation_takes_a_size_and_a_key_for_every_element():
  sizes = np.array([5, 1000, 77])
  keys = np.concatenate([key_of(k) for k in range(3)])
  together = permute(np.array([4, 999, 0]), sizes, keys)
  alone = [permute(x, n, k)[0] for x, n, k in zip([4, 999, 0], sizes, keys, strict=True)]
  assert together.tolist() == alone


def test_permutation_leaves_no_more_in_place_than_chance_does():
  n = 10_000  # A random permutation of any size has 1 fixed point on average, with variance 1.
  fixed = [np.sum(permute(np.arange(n), n, key_of(seed)) == np.arange(n)) for seed in range(50)]
  assert abs(np.mean(fixed) - 1) < 4 / np.sqrt(50)


def test_permutation_sends_neighbours_apart():
  n = 10_000
  steps = np.abs(np.diff(permute(np.arange(n), n, key_of(3))))
  assert abs(steps.mean() / (n / 3) - 1) < 0.05  # The mean distance of two random places.


def test_hashes_are_splitmix64():
  # The first outputs for the states 0 and 1234567, as published with the reference code.
  assert hashes(0, 0)[0] == 0xE220A8397B1DCDAF
  assert hashes(1234567, [0, 1, 2]).tolist() == [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
  ]
