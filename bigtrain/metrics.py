"""Metrics: what is written of each step, and how fast that was.

Model FLOPs are by formula, not by what a device happened to execute: each weight that a token meets
costs 2 forward and 4 backward, attention its two products over the positions it can see (half of
them where it is causal). MFU is that over the chip's peak in bfloat16 (PaLM, arXiv:2204.02311).
"""

import math
import time
from typing import TYPE_CHECKING

import jax

from bigtrain.parts import Part

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


class Recorder(Part):
  """Records a row at each logging interval and at the last step.

  The metrics of a step are fetched when the next one has been dispatched, so that the device never
  waits for the host, and no more than one step is ever ahead.
  """

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    self.pending: tuple[int, dict[str, jax.Array]] | None = None
    self.peak = peak_flops()
    self._begin_interval()

  def after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self.flush()
    self.pending = step, metrics
    rows, *dims = self.run.spec(step - 1).shape
    self.tokens += rows * math.prod(dims[:1])
    self.flops += rows * (self.run.experiment.model.flops(*dims[:1]) or 0.0)
    self.steps, self.waited = self.steps + 1, self.waited + self.run.feed.wait
    if step == self.run.experiment.steps:
      self.flush()

  def on_save(self, step: int) -> None:
    self.flush()

  def flush(self) -> None:
    """Waits for the pending step, and records it if it is one to log."""
    if self.pending is None:
      return
    (step, metrics), self.pending = self.pending, None
    jax.block_until_ready(metrics)
    c = self.run.experiment
    if step % c.logging.every == 0 or step == c.steps:
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
      self.run.record(step, "train", values | self._speed())
      self._begin_interval()

  def _begin_interval(self) -> None:
    self.tokens = self.steps = 0
    self.flops = self.waited = 0.0
    self.since, self.away = time.perf_counter(), self.run.seconds_away()

  def _speed(self) -> dict[str, float]:
    """Means over the interval, without the time that went to evaluation, saving or compiling."""
    away = self.run.seconds_away() - self.away
    seconds = max(time.perf_counter() - self.since - away, 1e-9)
    speed = {
      "step_seconds": seconds / max(self.steps, 1),
      "input_wait_seconds": self.waited / max(self.steps, 1),
      "tokens_per_second": self.tokens / seconds,
      "model_flops_per_second": self.flops / seconds,
    }
    if self.peak is not None:
      speed["mfu"] = self.flops / seconds / self.peak
    return speed
