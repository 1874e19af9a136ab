"""Signals that are lost, or blown up, on their way through a stack of layers.

The gradient of a weight is its input times what came back to its output. Where activations grow on
their way forward as gradients do on their way back, that product is the same everywhere, and the
activations alone tell: so both are looked at.
"""

from collections.abc import Iterator

import numpy as np

from bigtrain.diagnose.records import Finding, Records

FEW = 4  # A shallower stack has no depth to speak of.
LOST = 1e-3  # What is left of a signal behind a stack; its inverse is too much.


def vanishing_gradients(r: Records) -> Iterator[Finding]:
  for name, way in _ways(r):
    start, end = _ends(way)
    if end < LOST * start:
      lost = next(at for at, size in way.items() if size < LOST * start)
      yield Finding(
        "vanishing gradients",
        f"{_told(name, way)}; from {lost} on, hardly anything of it is left",
        "Use relu, leaky_relu or prelu in place of sigmoid or tanh, residual connections, "
        "normalisation, or an initialisation that keeps the variance",
        explains=("learning rate too low",),
      )
      return


def exploding_gradients(r: Records) -> Iterator[Finding]:
  for name, way in _ways(r):
    start, end = _ends(way)
    if start < LOST * end:
      yield Finding(
        "exploding gradients",
        _told(name, way),
        "Initialise with smaller weights, normalise the layers, and clip the gradient",
      )
      return


def _ways(r: Records) -> Iterator[tuple[str, dict[str, float]]]:
  """Each signal and its sizes by layer, in the order in which it goes through a stack."""
  for statistic, name, step in (("gradient", "the gradient", -1), ("output", "activations", 1)):
    for depths in r.by_depth(statistic).values():
      if len(depths) >= FEW and np.isfinite([*depths.values()]).all():
        yield name, dict([*depths.items()][::step])


def _ends(way: dict[str, float]) -> tuple[float, float]:
  """Its sizes in the first and in the last quarter."""
  sizes, n = [*way.values()], max(len(way) // 4, 1)
  return float(np.median(sizes[:n])), float(np.median(sizes[-n:]))


def _told(name: str, way: dict[str, float]) -> str:
  (first, start), *_, (last, end) = way.items()
  verb = "goes" if name.startswith("the") else "go"
  return f"from {first} to {last}, {name} {verb} from {start:.0e} to {end:.0e}"
