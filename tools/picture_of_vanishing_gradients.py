"""Trains experiments/vanishing_gradients.py and draws docs/images/vanishing_gradients.png.

`python tools/picture_of_vanishing_gradients.py [--out runs]` takes about a minute. Runs that are in
--out already are not made again. It prints the table of docs/vanishing_gradients.md, and what is
diagnosed of each run.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bigtrain.diagnose import Records, diagnose, read
from bigtrain.load import functions
from bigtrain.train import train

ROOT = pathlib.Path(__file__).parent.parent
FILE = ROOT / "docs" / "images" / "vanishing_gradients.png"
# Told apart by those who see no colours, too (Okabe and Ito 2008).
COLOURS = ("#d55e00", "#0072b2", "#56b4e9", "#009e73", "#e69f00")
SIZE, PANEL, TOP, LEFT = (1000, 380), (400, 290), 40, (70, 570)  # Pixels.
FINE = 3  # Drawn so many times larger, then made smooth.

Curve = tuple[np.ndarray, np.ndarray]


def main() -> None:
  parser = argparse.ArgumentParser(description="Trains and draws the vanishing gradients.")
  parser.add_argument("--out", default="runs", help="where the runs are made")
  out = pathlib.Path(parser.parse_args().out)
  gradients, accuracies = {}, {}
  for name, function in functions(ROOT / "experiments" / "vanishing_gradients.py").items():
    folder = out / f"vanishing_gradients-{name}"
    run = train(function(), folder, quiet=True)
    records = read(folder)
    gradients[name] = by_depth(records)
    accuracy = run.evaluations["eval/validation/accuracy"]
    accuracies[name] = run.evaluations["step"], 100 * accuracy
    first, last = (gradients[name][1][i] for i in (0, -1))
    print(f"| `{name}` | {accuracy[-1]:.1%} | {first:.0e} | {last:.0e} |")
    print(*diagnose(records), sep="\n")
  sheet = Image.new("RGB", (SIZE[0] * FINE, SIZE[1] * FINE), "white")
  panel(sheet, 0, "Gradient of each layer's weights, root mean square", "layer", gradients, 4)
  panel(sheet, 1, "Accuracy on held-out digits, %", "step", accuracies, None)
  sheet.resize(SIZE, Image.Resampling.LANCZOS).quantize(64).save(FILE, optimize=True)


def by_depth(records: Records) -> Curve:
  """The gradient of each layer, the median over the run."""
  (depths,) = records.by_depth("gradient").values()
  return np.arange(len(depths)), np.array([*depths.values()])


def panel(
  sheet: Image.Image, at: int, title: str, below: str, curves: dict[str, Curve], decades: int | None
) -> None:
  """One plot with its axes; its legend, where it is the first. `decades` between ticks, or None
  for a linear axis from 0 to 100."""
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13 * FINE)
  (width, height), left = PANEL, LEFT[at]
  xs = np.concatenate([x for x, _ in curves.values()])
  ys = np.concatenate([y for _, y in curves.values()])
  scale = (lambda y: np.log10(y)) if decades else (lambda y: y)
  low, high = (0.0, 100.0) if decades is None else (np.floor(scale(ys.min())), 0.0)
  place = lambda x, y: (
    FINE * (left + width * x / xs.max()),
    FINE * (TOP + height * (high - scale(y)) / (high - low)),
  )
  text = lambda x, y, words, anchor, colour="black": draw.text(
    (FINE * x, FINE * y), words, fill=colour, font=font, anchor=anchor
  )
  text(left, TOP - 22, title, "lm")
  text(left + width / 2, TOP + height + 32, below, "mm")
  for tick in np.arange(high, low - 1e-9, -(decades or 20)):
    value = 10.0**tick if decades else tick
    (x, y), (end, _) = place(0, value), place(xs.max(), value)
    draw.line([(x, y), (end, y)], fill="#dddddd", width=FINE)
    text(left - 8, y / FINE, f"1e{tick:.0f}" if decades else f"{tick:.0f}", "rm")
  for x in np.arange(0, xs.max() + 1, 10 ** int(np.log10(xs.max()))):
    text(left + width * x / xs.max(), TOP + height + 12, str(x), "mm")
  for i, ((name, (x, y)), colour) in enumerate(zip(curves.items(), COLOURS, strict=True)):
    points = [place(*point) for point in zip(x, y, strict=True)]
    draw.line(points, fill=colour, width=2 * FINE, joint="curve")
    if at == 0:
      text(left + width - 110, TOP + 130 + 20 * i, name, "lm", colour)


if __name__ == "__main__":
  main()
