"""Pictures of the report, as SVG in the page."""

from collections.abc import Callable

from bigtrain.console import human


def histogram(before: list[int], after: list[int]) -> str:
  """Two histograms over each other as SVG; bin b begins at 2**(b / 2) characters."""
  used = [b for b, n in enumerate(before) if n] + [b for b, n in enumerate(after) if n]
  if not used:
    return "<p>There are no documents.</p>"
  low, high, top = min(used), max(used) + 1, max([*before, *after])
  width, height, left = 900 / (high - low), 180, 50
  out = [f"<svg viewBox='0 0 960 {height + 60}' role=img style='width:100%;font-size:12px'>"]
  for b in range(low, high):
    x = left + (b - low) * width
    for n, colour, inset in ((before[b], "#c3cedb", 0.5), (after[b], "#3b7dd8", width * 0.2)):
      h = height * n / top
      box = f"x='{x + inset:.1f}' y='{10 + height - h:.1f}' width='{width - 2 * inset:.1f}'"
      title = f"{human(2 ** (b / 2))} to {human(2 ** ((b + 1) / 2))} characters: {n:,}"
      out.append(f"<rect {box} height='{h:.1f}' fill='{colour}'><title>{title}</title></rect>")
    if b % 2 == 0:
      out.append(
        f"<text x='{x:.0f}' y='{height + 26}' text-anchor=middle>{human(2 ** (b / 2))}</text>"
      )
  out.append(f"<line x1={left} x2=950 y1={10 + height} y2={10 + height} stroke='#5a6675'/>")
  for share in (0.5, 1):
    y = 10 + height * (1 - share)
    out.append(f"<line x1={left} x2=950 y1={y:.0f} y2={y:.0f} stroke='#1c2430' opacity='.12'/>")
    out.append(f"<text x={left - 6} y={y + 4:.0f} text-anchor=end>{human(share * top)}</text>")
  key = ((left, "#c3cedb", "read"), (left + 90, "#3b7dd8", "kept"))
  for x, colour, label in key:
    out.append(f"<rect x={x} y={height + 42} width=12 height=12 fill='{colour}'/>")
    out.append(f"<text x={x + 18} y={height + 53}>{label}</text>")
  out.append(f"<text x=950 y={height + 53} text-anchor=end>characters of a document</text></svg>")
  return "".join(out)


def curve(chance: Callable[[float], float], threshold: float) -> str:
  """The probability that a pair is found, by its similarity, and where the threshold is."""
  left, height, width = 50, 150, 400
  at = lambda s, p: f"{left + width * s:.1f},{10 + height * (1 - p):.1f}"
  points = " ".join(at(i / 100, chance(i / 100)) for i in range(101))
  x = left + width * threshold
  out = ["<svg viewBox='0 0 480 210' role=img style='width:30rem;max-width:100%;font-size:11px'>"]
  box = f"x={x:.1f} y=10 width={left + width - x:.1f} height={height}"
  out.append(f"<rect {box} fill='#3b7dd8' opacity='.1'/>")
  for share in (0, 0.5, 1):
    y = 10 + height * (1 - share)
    out.append(
      f"<line x1={left} x2={left + width} y1={y} y2={y} stroke='#1c2430' opacity='.15'/>"
      f"<text x={left - 6} y={y + 4} text-anchor=end>{share:.0%}</text>"
    )
  for i in range(0, 11, 2):
    out.append(
      f"<text x={left + width * i / 10} y={height + 26} text-anchor=middle>{i / 10}</text>"
    )
  out.append(f"<polyline points='{points}' fill=none stroke='#3b7dd8' stroke-width=2 />")
  out.append(f"<line x1={x:.1f} x2={x:.1f} y1=10 y2={10 + height} stroke='#e07b39'/>")
  out.append(
    f"<text x={x - 6:.1f} y=24 text-anchor=end fill='#c05f1f'>threshold {threshold}</text>"
  )
  out.append(
    f"<text x={left} y={height + 46}>chance that a pair of this Jaccard similarity is found"
  )
  return "".join(out) + "</text></svg>"
