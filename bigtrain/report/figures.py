"""Charts: curves over steps, and layers over steps."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bigtrain.console import human
from bigtrain.report.elements import Html, joined, number
from bigtrain.report.svg import BAD, SERIES, box, figure, hit

WIDTH, HEIGHT = 420, 220  # Of a chart, which the page scales to its column.
POINTS = 600  # Of a curve; more are bucketed, each bucket kept by its least and its greatest.
HITS = 60  # Stripes of a chart whose titles tell its values.


class Curve(NamedTuple):
  """One line of a chart."""

  name: str
  x: np.ndarray
  y: np.ndarray
  color: str = SERIES[0]
  marks: bool = False  # Points too; for curves of few.
  smooth: bool = False  # A running median over the values, which are drawn faintly.


class Look(NamedTuple):
  """How the axes of a chart are."""

  log: bool = False
  percent: bool = False
  zero: bool = False  # From zero on.


def chart(
  curves: Sequence[Curve],
  look: Look,
  steps: float,
  label: str,
  *,
  events: Sequence[tuple[float, str]] = (),
) -> Html:
  """Curves over steps.

  Args:
    curves: not all empty.
    look: of its axes.
    steps: the last one, where the axis ends.
    label: what it shows, for who cannot see it.
    events: steps with what was there, drawn as lines.
  """
  left, right, top, bottom = 46, WIDTH - 10, 8, HEIGHT - 24
  scale: dict[str, Any] = {}

  def draw(made) -> None:
    axes = made.add_axes(box(left, top, right, bottom, WIDTH, HEIGHT))
    for step, _ in events:
      axes.axvline(step, color=BAD, lw=1, ls=(0, (2, 2)), alpha=0.6)
    for curve in curves:
      _draw(axes, curve)
    if look.log and any((c.y > 0).any() for c in curves):
      axes.set_yscale("log")
    axes.set_xlim(-0.01 * steps, 1.01 * steps)
    axes.set_ylim(*_limits(curves, look))
    _format(axes, look)
    scale["x"] = axes.get_xlim()

  svg = figure(draw, WIDTH, HEIGHT, label)
  return Html(f"{svg}{_hits(curves, look, scale['x'], (left, top, right, bottom), events)}</svg>")


def _format(axes, look: Look) -> None:
  """Few ticks, at round numbers."""
  from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
  axes.xaxis.set_major_formatter(lambda v, _: human(v))
  low, high = axes.get_ylim()
  if axes.get_yscale() == "linear":
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
  else:
    few = high / low < 100
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=6))
  axes.yaxis.set_minor_locator(NullLocator())
  shown = (lambda v: f"{100 * v:.3g}%") if look.percent else (lambda v: _short(v, high))
  axes.yaxis.set_major_formatter(lambda v, _: shown(v))


def _short(value: float, largest: float) -> str:
  """For an axis: 3 digits, with a letter where it is large, all alike where they are tiny."""
  if value and (abs(largest) < 0.01 or abs(value) < 1e-3):
    return re.sub(r"\.?0*e-0?", "e-", f"{value:.2e}")
  return human(value) if value >= 1000 else f"{value:.3g}"


def _draw(axes, curve: Curve) -> None:
  keep = np.isfinite(curve.y)
  x, y = curve.x[keep], curve.y[keep]
  whole = _thinned(x, y)
  if curve.smooth and len(y) >= 40:
    axes.plot(*whole, color=curve.color, lw=1, alpha=0.3)
    whole = _running_median(x, y, max(len(y) // 40, 3))
  x, y = whole
  marks = curve.marks or len(x) == 1
  axes.plot(x, y, color=curve.color, marker="o" if marks else None, ms=3.5)


def _running_median(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
  """At as many places as are drawn."""
  at = np.unique(np.linspace(0, len(y) - 1, POINTS).astype(int))
  windows = (y[max(i - width // 2, 0) : i + width // 2 + 1] for i in at)
  return x[at], np.array([np.median(window) for window in windows])


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most POINTS of a curve, its peaks among them."""
  if len(x) <= POINTS:
    return x, y
  edges = np.linspace(0, len(x), POINTS // 2 + 1).astype(int)
  ends = itertools.pairwise(edges)
  kept = [a + f(y[a:b]) for a, b in ends for f in (np.argmin, np.argmax)]
  kept = np.unique(kept)
  return x[kept], y[kept]


def _limits(curves: Sequence[Curve], look: Look) -> tuple[float, float]:
  """Of the axis; a spike far above the rest does not press that into a line."""
  values = np.concatenate([c.y[np.isfinite(c.y)] for c in curves])
  values = values[values > 0] if look.log and (values > 0).any() else values
  if not len(values):
    return 0.0, 1.0
  low, high = float(values.min()), float(values.max())
  if not look.log and len(values) > 50 and high > 3 * (most := float(np.quantile(values, 0.98))):
    high = max(1.5 * most, low)
  if look.log:
    return low / 1.3, high * 1.3
  room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
  return (0.0 if look.zero and low >= 0 else low - room), high + room


def _hits(curves: Sequence[Curve], look: Look, limits, frame, events) -> Html:
  """Stripes that show, under the pointer, where it is, and by their titles what is there."""
  left, top, right, bottom = frame
  xs = np.unique(np.concatenate([c.x[np.isfinite(c.y)] for c in curves]))
  xs = xs[np.unique(np.linspace(0, len(xs) - 1, HITS).astype(int))] if len(xs) else xs
  place = lambda x: left + (x - limits[0]) / (limits[1] - limits[0]) * (right - left)
  centres = [place(x) for x in xs]
  edges = [left, *((a + b) / 2 for a, b in itertools.pairwise(centres)), right]
  shown = (lambda v: f"{v:.2%}") if look.percent else number
  out = []
  for i, x in enumerate(xs):
    lines = [f"step {x:,.0f}"]
    for curve in curves:
      near = np.flatnonzero(np.isfinite(curve.y))
      if len(near):
        at = near[np.argmin(np.abs(curve.x[near] - x))]
        same = curve.x[at] == x
        lines.append(f"{curve.name} {shown(float(curve.y[at]))}" if same else "")
    between = (xs[i - 1] if i else -math.inf, xs[i + 1] if i + 1 < len(xs) else math.inf)
    lines += [said for step, said in events if between[0] < step < between[1]]
    out.append(hit(edges[i], top, edges[i + 1], bottom, "\n".join(filter(None, lines))))
  return joined(out)


def heat(names: Sequence[str], steps: np.ndarray, values: np.ndarray, label: str) -> Html:
  """Positive values of layers (rows) over steps (columns), by the logarithm of their size."""
  row = max(min(14.0, 420 / len(names)), 3.0)
  every = math.ceil(11 / row)  # Names that do not run into each other.
  shown = [_tail(name, 26) for name in _without_stack(names)]
  left = 14 + 5.6 * max(map(len, shown))
  top, right = 4, WIDTH - 64
  bottom = top + row * len(names)
  height = round(bottom + 24)
  with np.errstate(divide="ignore", invalid="ignore"):
    logs = np.where(values > 0, np.log10(values), np.nan)
  logs[~np.isfinite(logs)] = np.nan

  def draw(made) -> None:
    axes = made.add_axes(box(left, top, right, bottom, WIDTH, height))
    image = axes.imshow(logs, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    ticks = np.unique(np.linspace(0, len(steps) - 1, 4).astype(int))
    axes.set_xticks(ticks, [human(float(steps[i])) for i in ticks])
    at = range(0, len(names), every)
    axes.set_yticks(at, [shown[i] for i in at], fontsize=9.5)
    bar = made.add_axes(box(right + 10, top, right + 18, min(bottom, top + 160), WIDTH, height))
    scale = made.colorbar(image, cax=bar, format=lambda v, _: _short(float(f"{10**v:.2g}"), 1.0))
    scale.outline.set_visible(False)
    scale.locator = _few()
    bar.grid(False)
    bar.tick_params(length=0, labelsize=9.5)
    scale.update_ticks()

  svg = figure(draw, WIDTH, height, label)
  hits = []
  for i, name in enumerate(names):
    found = values[i][np.isfinite(values[i])]
    range_ = f": {number(float(found[0]))} at first, {number(float(found[-1]))} at last" * bool(
      len(found)
    )
    hits.append(hit(left, top + i * row, right, top + (i + 1) * row, f"{name}{range_}"))
  return Html(f"{svg}{joined(hits)}</svg>")


def _few():
  from matplotlib.ticker import MaxNLocator

  return MaxNLocator(4)


def _without_stack(names: Sequence[str]) -> list[str]:
  """The layers' names without that of their stack, where there is one."""
  stacks = {found[0] for name in names if (found := re.match(r".*?\b(?=\d+(\.|$))", name))}
  alone = next(iter(stacks)) if len(stacks) == 1 else ""
  return [name.removeprefix(alone) for name in names]


def _tail(name: str, most: int) -> str:
  """The end of a name, which says more than its beginning."""
  return name if len(name) <= most else f"…{name[1 - most :]}"
