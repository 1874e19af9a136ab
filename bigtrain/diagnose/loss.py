"""The course of the loss: divergence, learning rates that do not fit, spikes, over-fitting.

A rise is large or small by what the run had learned, the fall of its loss so far: near zero a loss
doubles without any harm.
"""

from collections.abc import Iterator

import numpy as np

from bigtrain.diagnose.records import Course, Finding, Records, course, late

LARGE = 0.05  # An update, of the weights; root mean squares.
REACH = 0.01  # What all updates together could do to the weights, at most, if each were as large.
ROSE = 0.1  # Share of what was learned.
SPIKE = 8.0  # Standard deviations above the rows around it.
AROUND = 11  # Rows.
OVERFIT = 0.05  # Rise of a held-out loss above its best.
LOWER = "Lower the learning rate (try a third of it), lengthen the warm-up, or clip the gradient"


def divergence(r: Records) -> Iterator[Finding]:
  loss = r.train.get("loss", np.array([]))
  if len(bad := np.flatnonzero(~np.isfinite(loss))):
    first = r.train["step"][bad[0]]
    again = "" if len(bad) == len(loss) - bad[0] else f", in {len(bad)} rows,"
    yield Finding(
      "divergence",
      f"the loss is not finite{again} from step {first:.0f} on",
      "Lower the learning rate or lengthen the warm-up; clip the gradient; compute in float32",
    )


def rate_too_high(r: Records) -> Iterator[Finding]:
  if (loss := r.losses()) is None:
    return
  c, ratios = course(loss), _update_ratios(r)
  if c.end > c.best + _much(c):
    yield Finding(
      "learning rate too high", f"the loss rose again from {c.best:.3g} to {c.end:.3g}", LOWER
    )
  elif c.highest > loss[0] + _much(c):
    yield Finding(
      "learning rate too high",
      f"the loss rose from {loss[0]:.3g} to {c.highest:.3g} before it fell",
      LOWER,
    )
  elif ratios and np.median([*ratios.values()]) > LARGE:
    worst = max(ratios, key=lambda at: ratios[at])
    yield Finding(
      "learning rate too high",
      f"each update moves {worst} by {ratios[worst]:.1%} of its size",
      LOWER,
    )


def rate_too_low(r: Records) -> Iterator[Finding]:
  if (loss := r.losses()) is None or not (ratios := _update_ratios(r)):
    return
  c, steps = course(loss), r.train["step"][-1]
  moved = float(np.median([*ratios.values()]))
  if moved * steps < REACH and c.start - c.end < 2 * c.noise:
    yield Finding(
      "learning rate too low",
      f"an update moves the weights by {moved:.0e} of their size, so that {steps:.0f} of them can "
      f"have moved them by {moved * steps:.1g} of it at most; the loss was {c.start:.3f} and is "
      f"{c.end:.3f}",
      "Raise the learning rate tenfold and look again",
    )


def loss_spikes(r: Records) -> Iterator[Finding]:
  loss = r.losses()
  if loss is None or len(loss) < 2 * AROUND:
    return
  height = np.fmax(loss, r.train.get("loss_max", loss))
  scores = _spike_scores(height)
  high = scores > SPIKE
  high &= height > _around(height)[0] + _much(course(loss))
  at = np.flatnonzero(high & ~np.roll(high, 1))  # Of neighbours, the first.
  if len(at):
    steps = ", ".join(f"{r.train['step'][i]:.0f}" for i in at[:5])
    worst = at[np.argmax(height[at])]
    yield Finding(
      "loss spikes",
      f"the loss leaps {len(at)} times, at step {steps} or just before; it reached "
      f"{height[worst]:.3g}, {scores[worst]:.0f} standard deviations above what is around it",
      "Look at the batches of these steps (`run.data.batch` gives any again); clip the gradient, "
      "or lower the learning rate",
      severity="trouble" if len(at) > 2 else "advice",
    )


def overfitting(r: Records) -> Iterator[Finding]:
  if (loss := r.losses()) is None:
    return
  now, start = np.median(loss[-10:]), course(loss).start
  for name, held_out in r.evaluations.items():
    if not name.endswith("/loss") or not np.isfinite(held_out).all():
      continue
    steps, best, last = r.evaluations["step"], int(np.argmin(held_out)), held_out[-1]
    much = OVERFIT * max(held_out[best], start - held_out[best])
    rows = max(np.searchsorted(r.train["step"], steps[best], "right"), 1)
    then = np.median(loss[:rows][-10:])
    if last - held_out[best] > much and last - now > much and now < then:
      yield Finding(
        "over-fitting",
        f"{name} was {held_out[best]:.3f} at step {steps[best]:.0f} and is {last:.3f}, while the "
        f"training loss fell to {now:.3g}",
        "Stop there; or use more data, dropout, weight decay, augmentation, or a smaller model",
      )


def _much(c: Course) -> float:
  """A rise that is neither noise nor little beside what was learned, nor beside the loss itself."""
  return max(5 * c.noise, ROSE * c.fall, 0.02 * abs(c.start))


def _update_ratios(r: Records) -> dict[str, float]:
  """What an update is of the weights that it changes, by layer, while the rate is near its peak."""
  parameters = r.of("parameter")
  steps = r.layers.get("step", np.zeros(0))
  rate = np.interp(steps, r.train["step"], r.train.get("learning_rate", r.train["step"] * 0 + 1))
  near = rate >= 0.5 * rate.max(initial=0)
  return {
    at: float(np.nanmedian((update / np.maximum(parameters[at], 1e-12))[near]))
    for at, update in r.of("update").items()
    if late(parameters[at]) > 1e-6
  }


def _around(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Median and robust standard deviation of the rows around each."""
  windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, AROUND // 2, "edge"), AROUND)
  middle = np.median(windows, axis=1)
  return middle, 1.4826 * np.median(np.abs(windows - middle[:, None]), axis=1)


def _spike_scores(loss: np.ndarray) -> np.ndarray:
  """Standard deviations by which each stands above those around it.

  Of logarithms, for near zero losses spread over orders of magnitude; 1% at least.
  """
  values = np.log(loss) if (loss > 0).all() else loss / np.abs(loss).max()
  middle, deviation = _around(values)
  return (values - middle) / np.maximum(deviation, 0.01)
