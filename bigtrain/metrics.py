"""Metrics: what is written of each step, and how fast that was.

Model FLOPs are by formula, not by what a device happened to execute: each weight that a token meets
costs 2 forward and 4 backward, attention its two products over the positions it can see (half of
them where it is causal). MFU is that over the chip's peak in bfloat16 (PaLM, arXiv:2204.02311).
"""

import math
import time
from typing import TYPE_CHECKING, Any

import jax

from bigtrain import goodput
from bigtrain.parts import Behind
from bigtrain.phases import within
from bigtrain.statistics import by_layer

if TYPE_CHECKING:
  from bigtrain.run import Run

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
PEAK = {
  "TPU v3": 61.5e12,  # A device is a core, half a chip.
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
  """FLOP/s of all devices together; None where the chip is not known."""
  kind = jax.devices()[0].device_kind
  known = [name for name in PEAK if kind.startswith(name)]
  return PEAK[max(known, key=len)] * jax.device_count() if known else None


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
  """The metrics of a step, but for means of nothing that show no fault."""
  scalars = jax.device_get({name: x for name, x in metrics.items() if name != "layers"})
  weights = scalars.pop("weights", {})
  values = {name: float(value) for name, value in scalars.items()}
  return {k: x for k, x in values.items() if weights.get(k, 1) or not math.isfinite(x)}


class Recorder(Behind):
  """Records a row at each logging interval and at the last step."""

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    self.peak = peak_flops()
    self.in_tokens = bool(run.experiment.data.row_length())
    self.meter = goodput.Meter(run.directory)
    self._begin_interval(None)  # Later: the first step of a start, which warms up, is not timed.

  def after_step(self, step: int, metrics: dict[str, Any]) -> None:
    self.flush()  # Before this step counts.
    rows, lengths = self.run.feed.shape[0], self.run.feed.lengths if self.in_tokens else (1,)
    self.amount += rows * sum(lengths)
    self.flops += rows * (self.run.experiment.model.flops(*lengths) or 0.0)
    self.steps, self.waited = self.steps + 1, self.waited + self.run.feed.wait
    super().after_step(step, metrics)

  def look(self, step: int, metrics: dict[str, Any]) -> None:
    """Waits for a step, and records it if it is one to log."""
    with within("step"):
      next(iter(metrics.values())).block_until_ready()  # A program's outputs are ready together.
    now = time.perf_counter() - self.run.seconds_away()  # A clock that runs while it trains.
    c = self.run.experiment
    due = step % c.logging.every == 0 or step == c.steps
    if due:
      values = _scalars(metrics)
      if (step - 1) % c.logging.every == 0:  # The row is of this step alone.
        values.pop("loss_max", None)
      speed = {} if self.since is None else self._speed(now - self.since)
      self.run.record(step, "train", values | speed)
    if "layers" in metrics:
      self.run.record(step, "layers", by_layer(jax.device_get(metrics["layers"])))
    if due or self.since is None:
      self._begin_interval(now)

  def _begin_interval(self, now: float | None) -> None:
    self.steps = self.amount = 0
    self.flops = self.waited = 0.0
    self.since = now

  def _speed(self, seconds: float) -> dict[str, float]:
    """Means over an interval of so many seconds of training."""
    speed = {
      "step_seconds": seconds / self.steps,
      "input_wait_seconds": self.waited / self.steps,
      "goodput": self.meter.add(seconds, self.waited),
      f"{'tokens' if self.in_tokens else 'examples'}_per_second": self.amount / seconds,
    }
    if self.flops:
      speed["model_flops_per_second"] = self.flops / seconds
      if self.peak is not None:
        speed["mfu"] = self.flops / seconds / self.peak
    return speed
