"""Charts: drawn by matplotlib, as SVG that takes its colours and its font from the page.

A figure is drawn in colours that stand for the page's (THEME), so that one picture serves a light
and a dark page, and on paper. One unit of its coordinates is a CSS pixel at its natural size.
"""

import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigtrain.config import Refused
from bigtrain.console import human
from bigtrain.hints import installed
from bigtrain.report.elements import Html, el, joined, number

WIDTH, HEIGHT = 420, 220  # Of a chart, which the page scales to its column.
POINTS = 600  # Of a curve; more are bucketed, each bucket kept by its least and its greatest.
HITS = 60  # Stripes of a chart whose titles tell its values.

INK, GRID, FAINT = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c0{i}" for i in range(8))
BAD = "#0a0d01"
THEME = {INK: "ink", GRID: "grid", FAINT: "faint", BAD: "bad"} | {
  c: f"c{i}" for i, c in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",
  "svg.hashsalt": "bigtrain",
  "text.parse_math": False,  # Names are no formulas.
  "font.family": "sans-serif",
  "font.size": 11,
  "text.color": FAINT,
  "axes.edgecolor": GRID,
  "axes.labelcolor": FAINT,
  "axes.facecolor": "none",
  "figure.facecolor": "none",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.axisbelow": True,
  "grid.color": GRID,
  "grid.linewidth": 1,
  "xtick.color": GRID,
  "xtick.labelcolor": FAINT,
  "ytick.color": GRID,
  "ytick.labelcolor": FAINT,
  "ytick.left": False,
  "xtick.major.size": 3,
  "lines.linewidth": 1.6,
  "lines.solid_joinstyle": "round",
}


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


def check_library() -> None:
  """Refuses to go on without matplotlib, with how to install it."""
  try:
    import matplotlib  # noqa: F401
  except ImportError as error:
    raise Refused(f"reports need matplotlib: {installed('report')}") from error


def figure(draw: Callable[[Any], None], width: int, height: int, label: str) -> str:
  """The SVG of what `draw` makes of a figure, without its end tag: hits follow."""
  import io

  import matplotlib
  from matplotlib.figure import Figure

  logging.getLogger("matplotlib").setLevel(logging.ERROR)  # Of fonts, which the page brings.
  file = io.StringIO()
  with matplotlib.rc_context(STYLE), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    made = Figure(figsize=(width / 72, height / 72))
    draw(made)
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    made.savefig(file, format="svg", metadata=none)
  return _themed(file.getvalue(), width, height, label)


_figures = itertools.count()


def _themed(svg: str, width: int, height: int, label: str) -> str:
  """Matplotlib's file as a part of a page."""
  body = svg[svg.index("<svg") :]
  body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
  # Every figure numbers its parts from 1: those that are referred to become the page's own.
  used, own = set(re.findall(r"#([\w-]+)\"|url\(#([\w-]+)\)", body)), f"f{next(_figures)}-"
  used = {name for pair in used for name in pair if name}
  body = re.sub(r' id="([^"]*)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else "", body)
  body = re.sub(r'href="#', f'href="#{own}', body)
  body = re.sub(r"url\(#", f"url(#{own}", body)
  body = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;\"]+", r"font-size: \1", body)
  body = re.sub(r"font-family: [^;\"]+; ", "", body)
  for colour, name in THEME.items():
    body = body.replace(colour, f"var(--{name})")
  head = str(el("svg", viewBox=f"0 0 {width} {height}", role="img", aria_label=label))
  body = re.sub(r"<svg[^>]*>", head.removesuffix("</svg>"), body, count=1)
  return re.sub(r"\n\s*", " ", body).removesuffix(" ").removesuffix("</svg>")


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
    axes = made.add_axes(_box(left, top, right, bottom, WIDTH, HEIGHT))
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


def _box(left: float, top: float, right: float, bottom: float, width: int, height: int):
  """A rectangle in pixels from the top left as matplotlib has it."""
  return left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height


def _hits(curves: Sequence[Curve], look: Look, limits, box, events) -> Html:
  """Stripes that show, under the pointer, where it is, and by their titles what is there."""
  left, top, right, bottom = box
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
    out.append(_hit(edges[i], top, edges[i + 1], bottom, "\n".join(filter(None, lines))))
  return joined(out)


def _hit(left: float, top: float, right: float, bottom: float, title: str) -> Html:
  size = {"width": f"{max(right - left, 0):.1f}", "height": f"{bottom - top:.0f}"}
  return el("rect", el("title", title), class_="hit", x=f"{left:.1f}", y=top, **size)


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
    axes = made.add_axes(_box(left, top, right, bottom, WIDTH, height))
    image = axes.imshow(logs, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    ticks = np.unique(np.linspace(0, len(steps) - 1, 4).astype(int))
    axes.set_xticks(ticks, [human(float(steps[i])) for i in ticks])
    at = range(0, len(names), every)
    axes.set_yticks(at, [shown[i] for i in at], fontsize=9.5)
    bar = made.add_axes(_box(right + 10, top, right + 18, min(bottom, top + 160), WIDTH, height))
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
    hits.append(_hit(left, top + i * row, right, top + (i + 1) * row, f"{name}{range_}"))
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


def bands(
  edges: np.ndarray, shares: dict[str, np.ndarray], colors: dict[str, str], width: int,
  marks: Sequence[tuple[float, str, str]], clock: Callable[[float], str], label: str,
) -> Html:  # fmt: skip
  """What time went to: shares of each stretch of time, stacked, with marks above.

  Args:
    edges: (n + 1,) seconds, between the stretches.
    shares: by name, (n,), which sum to 1.
    colors: of the names, as the page's CSS has them.
    width: in pixels.
    marks: (second, what is written there, what it is).
    clock: writes a time.
    label: what it shows.
  """
  left, right, top, bottom, height = 6, width - 6, 22, 92, 114
  end = float(edges[-1])

  def draw(made) -> None:
    axes = made.add_axes(_box(left, top, right, bottom, width, height))
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    ticks = np.linspace(0, end, 7 if width > 600 else 4)
    axes.set_xticks(ticks, [clock(t) for t in ticks])
    for label_, side in zip(
      axes.get_xticklabels()[:: len(ticks) - 1], ("left", "right"), strict=True
    ):
      label_.set_horizontalalignment(side)

  svg = figure(draw, width, height, label)
  place = lambda t: left + (right - left) * t / end
  parts, floor = [], np.zeros(len(edges) - 1)
  for name, share in shares.items():
    for i in np.flatnonzero(share > 1e-4):
      y = bottom - (bottom - top) * (floor[i] + share[i])
      size = {"width": f"{place(edges[i + 1]) - place(edges[i]) + 0.3:.2f}"}
      size["height"] = f"{(bottom - top) * share[i]:.2f}"
      style = f"fill:var(--{colors[name]})"
      parts.append(
        el("rect", class_="band", x=f"{place(edges[i]):.2f}", y=f"{y:.2f}", style=style, **size)
      )
    floor = floor + share
  for i in range(len(edges) - 1):
    told = [f"{clock(edges[i])} to {clock(edges[i + 1])}"]
    told += [f"{n} {s[i]:.0%}" for n, s in shares.items() if s[i] >= 0.005]
    box = place(edges[i]), top, place(edges[i + 1]), bottom
    parts.append(_hit(*box, "\n".join(told)))
  last = -math.inf
  for t, said, title in marks:
    x = place(t)
    line = {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": 16, "y2": bottom, "class_": "mark"}
    parts.append(el("line", el("title", title), **line))
    if x - last > 9 * len(said):  # Else it would run into the one before.
      anchor = "start" if x < 20 else "end" if x > width - 20 else "middle"
      text = {"x": f"{x:.1f}", "y": 12, "text_anchor": anchor, "class_": "said"}
      parts.append(el("text", said, el("title", title), **text))
      last = x
  return Html(f"{svg}{joined(parts)}</svg>")
