import math

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.optim.schedule import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay

LR = 0.5


def rates(schedule, steps):
  """Of every update, and of the one that would follow the last."""
  return np.array([schedule.make(LR, steps)(s) for s in range(steps + 1)])


@pytest.mark.parametrize(
  "schedule", [cls(warmup=4) for cls in (Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay)]
)
def test_warm_up_rises_evenly_from_the_first_update_and_then_holds_the_peak(schedule):
  got = rates(schedule, 20)
  np.testing.assert_allclose(got[:4], LR * np.array([0.25, 0.5, 0.75, 1]), rtol=1e-6)
  assert got.max() == LR and got.argmax() == 3


def test_constant_stays():
  assert (rates(Constant(), 5) == LR).all()


def test_cosine_is_half_a_cosine_from_the_peak_to_its_final_share():
  got = rates(Cosine(warmup=4, final=0.25), 20)
  angle = np.pi * np.arange(17) / 16
  want = LR * (0.25 + 0.75 * (1 + np.cos(angle)) / 2)
  np.testing.assert_allclose(got[4:], want, rtol=1e-6)
  assert got[4] == LR and got[20] == LR * 0.25


def test_linear_is_a_line_to_its_final_share():
  got = rates(Linear(warmup=2, final=0.5), 10)
  np.testing.assert_allclose(got[2:], np.linspace(LR, LR / 2, 9), rtol=1e-6)
  assert got[10] == LR / 2


def test_stable_decay_holds_the_peak_until_its_share_of_the_run_is_left():
  got = rates(WarmupStableDecay(warmup=2, decay=0.25, final=0.5), 20)
  assert (got[1:16] == LR).all()
  np.testing.assert_allclose(got[15:], np.linspace(LR, LR / 2, 6), rtol=1e-6)
  assert got[20] == LR / 2


def test_inverse_square_root_halves_at_four_times_the_warm_up():
  rate = InverseSqrt(warmup=100).make(LR, 1000)
  assert float(rate(99)) == LR
  assert float(rate(399)) == LR / 2
  assert float(rate(899)) == pytest.approx(LR / 3, rel=1e-6)


@pytest.mark.parametrize("schedule", [Cosine(final=0), Linear(), WarmupStableDecay()])
def test_the_last_update_is_not_wasted_at_rate_zero(schedule):
  schedule.warmup = 0
  got = rates(schedule, 8)
  assert got[7] > 0 and got[8] == 0
  assert schedule.make(LR, 8)(9) == 0  # A run that goes on past its end stays there.


@pytest.mark.parametrize("cls", [Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_run_within_its_warm_up_only_rises(cls, steps):
  schedule = cls(warmup=10, **({"decay": 0.01} if cls is WarmupStableDecay else {}))
  got = rates(schedule, steps)[:steps]
  np.testing.assert_allclose(got, LR * np.arange(1, steps + 1) / 10, rtol=1e-6)


def test_a_million_steps_lose_no_precision():
  rate = Cosine(warmup=0, final=0).make(LR, 1_000_000)
  want = LR * (1 + math.cos(math.pi * 0.75)) / 2
  assert float(rate(750_000)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
  ("schedule", "field"),
  [
    (Cosine(warmup=-1), "warmup"),
    (InverseSqrt(warmup=0), "warmup"),
    (Linear(final=1.5), "final"),
    (Cosine(final=-0.1), "final"),
    (WarmupStableDecay(decay=0.0), "decay"),
    (WarmupStableDecay(decay=1.1), "decay"),
  ],
)
def test_impossible_values_are_refused_by_name(schedule, field):
  with pytest.raises(Refused, match=f"^{field} is"):
    schedule.check()
