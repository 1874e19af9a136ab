"""Rotations and sinusoids against their definitions in float64."""

import cmath
import math

import numpy as np
import pytest

from bigtrain.models.position import (
  Llama3Scaling,
  RelativeBuckets,
  Rotary,
  Sinusoidal,
  bucket,
  frequencies,
  rotate,
  sinusoid,
)
from tests import golden
from tests.models.build import normal


def test_rotation_multiplies_pairs_as_complex_numbers():
  x = normal(1, 5, 2, 3, 8)
  positions = np.array([[0, 1, 2, 0, 7]])
  found = np.asarray(rotate(Rotary(theta=100.0), x, positions))
  for t, position in enumerate(positions[0]):
    for h in range(4):
      turn = cmath.exp(1j * position * 100.0 ** (-2 * h / 8))
      expected = (np.float64(x[0, t, ..., h]) + 1j * x[0, t, ..., h + 4]) * turn
      np.testing.assert_allclose(found[0, t, ..., h], expected.real, atol=1e-5)
      np.testing.assert_allclose(found[0, t, ..., h + 4], expected.imag, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
  q, k = normal(1, 1, 1, 16, seed=1), normal(1, 1, 1, 16, seed=2)
  at = lambda x, position: np.asarray(rotate(Rotary(), x, np.array([[position]])))[0, 0, 0]
  score = lambda i, j: at(q, i) @ at(k, j)
  np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-2


def llama3_reference(freq, s):
  """As llama3's own code has it (github.com/meta-llama/llama-models, apply_scaling)."""
  wavelength = 2 * math.pi / freq
  if wavelength < s.original / s.high:
    return freq
  if wavelength > s.original / s.low:
    return freq / s.factor
  smooth = (s.original / wavelength - s.low) / (s.high - s.low)
  return (1 - smooth) * freq / s.factor + smooth * freq


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
  scaling = Llama3Scaling(factor=32.0)
  found = np.asarray(frequencies(Rotary(theta=500_000.0, scaling=scaling), 128))
  plain = [500_000.0 ** (-2 * h / 128) for h in range(64)]
  expected = [llama3_reference(freq, scaling) for freq in plain]
  np.testing.assert_allclose(found, expected, rtol=2e-6)
  ratio = found / plain
  kept, whole = np.sum(ratio > 0.9999), np.sum(ratio < 1 / 31.99)
  assert kept > 10 and whole > 10 and kept + whole < 63  # All three bands are there.


def test_sinusoids_equal_their_formula():
  positions = np.array([[0, 1, 50]])
  found = sinusoid(Sinusoidal(wavelength=100.0), positions, 6)[0]
  angle = positions[0][:, None] * 100.0 ** (-2 * np.arange(3) / 6)
  np.testing.assert_allclose(found, np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=1e-5)


def buckets_reference(after, n, distance, causal):
  """Section 2.1 of the paper, in whole numbers: no logarithm is rounded.

  The far bucket k of a side begins where away / exact >= (distance / exact) ** (k / far).
  """
  side = n if causal else n // 2
  exact = side // 2
  far = side - exact
  found = []
  for d in after.tolist():
    away = max(-d, 0) if causal else abs(d)
    bucket = away
    if away >= exact:
      reached = [k for k in range(far) if away**far * exact**k >= distance**k * exact**far]
      bucket = exact + max(reached)
    found.append(bucket + (side if d > 0 and not causal else 0))
  return found


@pytest.mark.parametrize(
  ("name", "n", "distance"), [("published", 32, 128), ("tiny", 8, 20), ("odd", 24, 100)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_the_paper_and_of_the_reference(name, n, distance, causal):
  after = np.arange(-300, 301)
  found = np.asarray(bucket(RelativeBuckets(buckets=n, distance=distance), after, causal=causal))
  side = "causal" if causal else "both"
  np.testing.assert_array_equal(found, golden.read("t5")[f"buckets_{name}_{side}"])
  assert found.tolist() == buckets_reference(after, n, distance, causal)
