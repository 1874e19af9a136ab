"""What time went to, as stacked shares of stretches of time."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from bigtrain.report.elements import Html, el, joined
from bigtrain.report.svg import box, figure, hit


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
    axes = made.add_axes(box(left, top, right, bottom, width, height))
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
    frame = place(edges[i]), top, place(edges[i + 1]), bottom
    parts.append(hit(*frame, "\n".join(told)))
  last, drawn = -math.inf, set()
  for t, said, title in marks:
    x = place(t)
    if (said, round(x)) in drawn:  # Thousands of incidents are as many lines as there are pixels.
      continue
    drawn.add((said, round(x)))
    line = {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": 16, "y2": bottom, "class_": "mark"}
    parts.append(el("line", el("title", title), **line))
    if x - last > 9 * len(said):  # Else it would run into the one before.
      anchor = "start" if x < 20 else "end" if x > width - 20 else "middle"
      text = {"x": f"{x:.1f}", "y": 12, "text_anchor": anchor, "class_": "said"}
      parts.append(el("text", said, el("title", title), **text))
      last = x
  return Html(f"{svg}{joined(parts)}</svg>")
