"""Units that no longer answer: dead, saturated, or attention that looks at one position only."""

from collections.abc import Iterator

import numpy as np

from bigtrain.diagnose.records import Finding, Records, late

SILENT = 0.5  # Share of a layer.
SPARSE = 0.02  # Of its inputs, a unit that is well may answer this share alone.
COLLAPSED, GREW = 0.05, 100.0  # Entropy in nats; attention logits (arXiv:2302.05442).


def dead_units(r: Records) -> Iterator[Finding]:
  # A batch may be too small for sparse units to show that they live: they count as missed.
  inputs = late(r.train["weight"]) if "weight" in r.train else np.inf
  missed = (1 - SPARSE) ** inputs
  found = _layers(r, "dead", missed + (1 - missed) * SILENT)
  if found:
    yield Finding(
      "dead units",
      f"{_worst(found, 'units')} are zero for every input of a batch",
      "Lower the learning rate, start biases at zero or above, or use leaky_relu, prelu or gelu",
      explains=("vanishing gradients",),  # Nothing comes back through them.
    )


def saturated_units(r: Records) -> Iterator[Finding]:
  if found := _layers(r, "saturated", SILENT):
    yield Finding(
      "saturated units",
      f"{_worst(found, 'outputs')} lie at the ends of their range, where the slope is near zero",
      "Use smaller initial weights, normalise the layer's input, or use relu or gelu",
    )


def attention_collapse(r: Records) -> Iterator[Finding]:
  entropies = {at: late(values) for at, values in r.of("entropy").items()}
  scores = {at: late(values) for at, values in r.of("score_max").items()}
  sick = {at for at, score in scores.items() if score > GREW and entropies[at] < COLLAPSED}
  if sick:
    worst = max(sick, key=lambda at: scores[at])
    others = f", as in {len(sick) - 1} other layers" if len(sick) > 1 else ""
    yield Finding(
      "attention collapse",
      f"scores of {worst} reach {scores[worst]:.0f}, and a query looks at one position (entropy "
      f"{entropies[worst]:.3f} nats){others}",
      "Normalise queries and keys (qk_norm), cap the scores (softcap), or lower the learning rate",
    )


def _layers(r: Records, statistic: str, limit: float) -> dict[str, float]:
  """The layers in which a share is above the limit."""
  shares = {at: late(values) for at, values in r.of(statistic).items()}
  return {at: share for at, share in shares.items() if share > limit}


def _worst(found: dict[str, float], what: str) -> str:
  worst = max(found, key=lambda at: found[at])
  others = f", and too many in {len(found) - 1} other layers," if len(found) > 1 else ""
  return f"{found[worst]:.0%} of the {what} of {worst}{others}"
