"""SVG by matplotlib, which takes its colours and its font from the page.

A figure is drawn in colours that stand for the page's (THEME), so that one picture serves a light
and a dark page, and on paper. One unit of its coordinates is a CSS pixel at its natural size.
"""

import itertools
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

from bigtrain.config import Refused
from bigtrain.hints import installed
from bigtrain.report.elements import Html, el

GRID, FAINT = "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0c0{i}" for i in range(8))
BAD = "#0a0d01"
THEME = {GRID: "grid", FAINT: "faint", BAD: "bad"} | {c: f"c{i}" for i, c in enumerate(SERIES)}
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


def box(left: float, top: float, right: float, bottom: float, width: int, height: int):
  """A rectangle in pixels from the top left as matplotlib has it."""
  return left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height


def hit(left: float, top: float, right: float, bottom: float, title: str) -> Html:
  size = {"width": f"{max(right - left, 0):.1f}", "height": f"{bottom - top:.0f}"}
  return el("rect", el("title", title), class_="hit", x=f"{left:.1f}", y=top, **size)
