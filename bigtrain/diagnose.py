"""Diagnosis: what a run's records say about its health, in sentences with evidence and a remedy.

It reads metrics.jsonl and events.jsonl alone, so it works while a run trains and after it failed.
Thresholds are set so that a healthy run is told nothing; docs/diagnose.md says how that was judged.
"""

import collections
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from bigtrain.columns import Columns, columns
from bigtrain.run_directory import RunDirectory

FEW_LAYERS = 4  # A shallower network has no depth to speak of.
VANISHED = 1e-3  # First layers' gradients over the last ones'.
SILENT = 0.5  # Share of a layer's units that never or always answer.
ENTROPY_COLLAPSED, SCORES_GREW = 0.05, 100.0  # Nats; attention logits (arXiv:2302.05442).
UPDATE_LARGE, UPDATE_SMALL = 0.05, 1e-6  # Of the weights, root mean squares, a step.
SPIKE = 8.0  # Robust standard deviations above the losses around it.
WAITS, COMPILES = 0.2, 0.5  # Shares of the time.
MFU_LOW = 0.1


class Finding(NamedTuple):
  """One thing that is wrong."""

  kind: str  # Such as "vanishing gradients".
  evidence: str  # Where, and the numbers.
  remedy: str

  def __str__(self) -> str:
    return f"{self.kind}: {self.evidence}. {self.remedy}"


class Records(NamedTuple):
  """What a run wrote."""

  train: Columns
  evaluations: Columns
  layers: Columns
  events: list[dict]


def read(directory: RunDirectory) -> Records:
  """The records of a run directory."""
  train, evaluations, layers = (columns(directory.rows(k)) for k in ("train", "eval", "layers"))
  return Records(train, evaluations, layers, directory.events())


def diagnose(records: Records) -> list[Finding]:
  """All that is wrong, what matters most first; empty for a healthy run."""
  return [finding for check in CHECKS for finding in check(records)]


def diverged(r: Records) -> Iterator[Finding]:
  loss, step = r.train.get("loss"), r.train.get("step")
  if loss is None or step is None or not len(loss):
    return
  bad = np.flatnonzero(~np.isfinite(loss))
  if len(bad):
    yield Finding(
      "divergence",
      f"the loss is not finite from step {step[bad[0]]:.0f} on",
      "Lower the learning rate or lengthen the warm-up; clip the gradient; compute in float32",
    )


def vanishing_or_exploding(r: Records) -> Iterator[Finding]:
  for stack, depths in _by_depth(r.layers, "gradient").items():
    names, sizes = [*depths], np.array([*depths.values()])
    if len(sizes) < FEW_LAYERS or not sizes[-1] > 0 or not np.isfinite(sizes).all():
      continue
    ends = max(len(sizes) // 4, 1)
    first, last = np.median(sizes[:ends]), np.median(sizes[-ends:])
    evidence = (
      f"the gradient is {first:.1e} in {stack}{names[0]} and {last:.1e} in {stack}{names[-1]}"
    )
    if first < VANISHED * last:
      yield Finding(
        "vanishing gradients",
        f"{evidence}: the first layers do not learn",
        "Use relu, leaky_relu or prelu in place of sigmoid or tanh, residual connections, "
        "normalisation, or an initialisation that keeps the variance",
      )
    elif last < VANISHED * first:
      yield Finding(
        "exploding gradients",
        evidence,
        "Clip the gradient, normalise the layers, or initialise with smaller weights",
      )


def silent_units(r: Records) -> Iterator[Finding]:
  kinds = {
    "dead": (
      "dead units",
      "are zero for every input",
      "Lower the learning rate, start biases at zero or above, or use leaky_relu, prelu or gelu",
    ),
    "saturated": (
      "saturated units",
      "lie at the ends of their activation, where its slope is near zero",
      "Use smaller initial weights, normalise the layer's input, or use relu or gelu",
    ),
  }
  for name, (kind, what, remedy) in kinds.items():
    shares = {at: _late(values) for at, values in _of(r.layers, name).items()}
    sick = {at: share for at, share in shares.items() if share > SILENT}
    if sick:
      worst = max(sick, key=lambda at: sick[at])
      others = f", and more than half in {len(sick) - 1} others" if len(sick) > 1 else ""
      yield Finding(kind, f"{sick[worst]:.0%} of the units of {worst} {what}{others}", remedy)


def attention(r: Records) -> Iterator[Finding]:
  scores = {at: _late(values) for at, values in _of(r.layers, "score_max").items()}
  entropies = {at: _late(values) for at, values in _of(r.layers, "entropy").items()}
  for at, score in scores.items():
    if score > SCORES_GREW and entropies.get(at, np.inf) < ENTROPY_COLLAPSED:
      yield Finding(
        "attention collapse",
        f"scores of {at} reach {score:.0f} and each query looks at one position "
        f"(entropy {entropies[at]:.3f} nats)",
        "Normalise queries and keys (qk_norm), cap the scores (softcap), or lower the rate",
      )
      return


def learning_rate(r: Records) -> Iterator[Finding]:
  loss = r.train.get("loss")
  if loss is None or len(loss) < 20 or not np.isfinite(loss).all():
    return
  ratios = _update_ratios(r.layers)
  moved = np.median([*ratios.values()]) if ratios else None  # By a typical layer.
  start, end = np.median(loss[: len(loss) // 10]), np.median(loss[-(len(loss) // 10) :])
  best, noise = _smooth(loss).min(), _noise(loss)
  lower = "Lower the learning rate (try a third of it), lengthen the warm-up, or clip the gradient"
  spikes = _spikes(loss)
  if end > best + max(5 * noise, 0.1 * abs(best)):
    yield Finding(
      "learning rate too high", f"the loss rose again from {best:.3f} to {end:.3f}", lower
    )
  elif len(spikes) >= 3:
    at = ", ".join(f"{r.train['step'][i]:.0f}" for i in spikes[:5])
    yield Finding("learning rate too high", f"the loss spikes, at steps {at}", lower)
  elif moved is not None and moved > UPDATE_LARGE:
    worst = max(ratios, key=lambda at: ratios[at])
    yield Finding(
      "learning rate too high",
      f"each update moves {worst} by {ratios[worst]:.1%} of its size",
      lower,
    )
  elif moved is not None and moved < UPDATE_SMALL and start - end < 2 * noise:
    yield Finding(
      "learning rate too low",
      f"each update moves the weights by {moved:.0e} of their size and the loss hardly falls "
      f"({start:.3f} to {end:.3f})",
      "Raise the learning rate tenfold and look again",
    )


def overfitting(r: Records) -> Iterator[Finding]:
  for name, loss in r.evaluations.items():
    if not name.endswith("/loss") or len(loss) < 3 or not np.isfinite(loss).all():
      continue
    steps, best = r.evaluations["step"], int(np.argmin(loss))
    before = r.train["loss"][r.train["step"] <= steps[best]]
    if best < len(loss) - 1 and loss[-1] > 1.05 * loss[best] and len(before):
      now = np.median(r.train["loss"][-10:])
      if now < np.median(before[-10:]):
        yield Finding(
          "over-fitting",
          f"{name} was {loss[best]:.3f} at step {steps[best]:.0f} and is {loss[-1]:.3f}, while the "
          f"training loss fell to {now:.3f}",
          "Stop there; or use more data, dropout, weight decay, augmentation, or a smaller model",
        )


def input_bound(r: Records) -> Iterator[Finding]:
  seconds, waited = (r.train.get(f"{name}_seconds") for name in ("step", "input_wait"))
  if seconds is None or waited is None:
    return
  share = np.nansum(waited) / max(np.nansum(seconds), 1e-9)
  if share > WAITS:
    yield Finding(
      "input-bound",
      f"steps wait for their batch {share:.0%} of the time",
      "Decode and augment less on the host, prepare the data ahead, or give it more cores",
    )


def compile_bound(r: Records) -> Iterator[Finding]:
  starts = [i for i, event in enumerate(r.events) if event["event"] == "start"]
  if not starts:
    return
  events = r.events[starts[-1] :]
  whole = events[-1]["time"] - events[0]["time"]
  compiling = sum(event["seconds"] for event in events if event["event"] == "compile")
  if compiling > COMPILES * whole and compiling > 60:
    yield Finding(
      "compile-bound",
      f"{compiling:.0f} of {whole:.0f} seconds went to compiling",
      "Scan over layers (a smaller model.unroll), keep batch shapes constant, or train for longer",
    )


def small_batch(r: Records) -> Iterator[Finding]:
  mfu = r.train.get("mfu")
  if mfu is not None and len(mfu) and _late(mfu) < MFU_LOW and not [*input_bound(r)]:
    yield Finding(
      "chip not filled",
      f"{_late(mfu):.1%} of the chip's peak is used, and the input is not what it waits for",
      "Raise the batch (or lower microbatches), the row length or the width; use bfloat16",
    )


CHECKS: tuple[Callable[[Records], Iterator[Finding]], ...] = (
  diverged,
  vanishing_or_exploding,
  silent_units,
  attention,
  learning_rate,
  overfitting,
  input_bound,
  compile_bound,
  small_batch,
)


def _of(layers: Columns, statistic: str) -> dict[str, np.ndarray]:
  """A statistic's values by layer."""
  start = f"{statistic}/"
  return {name.removeprefix(start): v for name, v in layers.items() if name.startswith(start)}


def _by_depth(layers: Columns, statistic: str) -> dict[str, dict[str, float]]:
  """{stack: {layer: its typical value}} in order of depth; the parts of a layer are one."""
  found: dict[str, dict[str, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for name, values in _of(layers, statistic).items():
    if match := re.match(r"(.*?\b)(\d+)(\.|$)", name):
      found[match[1]][match[2]].append(_late(values))
  return {
    stack: {at: float(np.sqrt(np.mean(np.square(by[at])))) for at in sorted(by, key=int)}
    for stack, by in found.items()
  }


def _late(values: np.ndarray) -> float:
  """The median of the second half, where a run has come to its own."""
  return float(np.nanmedian(values[len(values) // 2 :]))


def _update_ratios(layers: Columns) -> dict[str, float]:
  """What an update is of the weights it changes, at its largest over the run."""
  parameters = _of(layers, "parameter")
  return {
    at: float(np.nanmax(update / np.maximum(parameters[at], 1e-12)))
    for at, update in _of(layers, "update").items()
    if np.nanmax(parameters[at]) > 1e-6
  }


def _smooth(values: np.ndarray) -> np.ndarray:
  """Running medians over a tenth of the values."""
  width = max(len(values) // 10, 3)
  return np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)


def _noise(values: np.ndarray) -> float:
  """The standard deviation of neighbours' differences, robust to spikes."""
  differences = np.diff(values)
  return float(1.4826 * np.median(np.abs(differences - np.median(differences))) / np.sqrt(2))


def _spikes(values: np.ndarray) -> np.ndarray:
  """Where a value stands far above those around it, in the second half of a run or later."""
  width = 11
  if len(values) < 2 * width:
    return np.array([], int)
  windows = np.lib.stride_tricks.sliding_window_view(values, width)
  middle = np.median(windows, axis=1)
  spread = 1.4826 * np.median(np.abs(windows - middle[:, None]), axis=1)
  score = (values[width // 2 : -(width // 2)] - middle) / np.maximum(spread, 0.01 * np.abs(middle))
  return width // 2 + np.flatnonzero(score > SPIKE)
