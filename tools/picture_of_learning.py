"""Draws accuracy over a run, in training and held out, of one or several runs, as an SVG.

`python tools/picture_of_learning.py --out docs/images/mlp.svg --epochs 10 RUN...`, each RUN a run
directory, perhaps with how it is called: `runs/mlp=made up`.
"""

import argparse
import json
import pathlib
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BELOW = 640, 360, 52, 20, 150, 44  # Pixels; margins.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito 2008.
POINTS = 20  # Of a training curve: each the mean of the rows around it.
Curve = tuple[np.ndarray, np.ndarray]  # Share of the run, and accuracy.


def curves(run: pathlib.Path) -> tuple[Curve, Curve]:
  """Accuracy in training and held out, by the share of the run that was done."""
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  steps = json.loads((run / "config.json").read_text())["steps"]
  pick = lambda name: np.array([(row["step"] / steps, row[name]) for row in rows if name in row]).T
  parts = np.array_split(pick("accuracy"), POINTS, axis=1)
  x, y = np.array([part.mean(1) for part in parts if part.size]).T
  held_out = pick("eval/validation/accuracy")
  return (x, y), (held_out[0], held_out[1])


def picture(runs: dict[str, tuple[Curve, Curve]], epochs: float, low: float) -> str:
  """The SVG: dashes in training, solid held out, and the last held-out accuracy beside its name."""
  width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BELOW
  right = lambda share: LEFT + width * share
  up = lambda accuracy: TOP + height * (1 - (max(accuracy, low) - low) / (1 - low))
  shapes = []

  def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "black") -> None:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    shapes.append(f"<text {at}>{escape(words)}</text>")

  def line(curve: Curve, style: str) -> None:
    points = " ".join(f"{right(x):.1f},{up(y):.1f}" for x, y in zip(*curve, strict=True))
    shapes.append(f'<polyline points="{points}" fill="none" {style}/>')

  for accuracy in np.linspace(low, 1, 6):
    line((np.array([0, 1]), np.full(2, accuracy)), 'stroke="#ddd"')
    text(LEFT - 6, up(accuracy) + 4, f"{100 * accuracy:.0f}%", "end")
  for share in np.linspace(0, 1, 6):
    text(right(share), HEIGHT - BELOW + 18, f"{epochs * share:g}", "middle")
  text(right(0.5), HEIGHT - 8, "epochs; solid: held out, dashed: in training", "middle")
  # Names keep clear of each other.
  height_of = 1e9
  order = sorted(runs, key=lambda name: runs[name][1][1][-1])
  for name in order:
    training, held_out = runs[name]
    colour = COLOURS[[*runs].index(name) % len(COLOURS)]
    line(training, f'stroke="{colour}" stroke-dasharray="3 3"')
    line(held_out, f'stroke="{colour}" stroke-width="2"')
    height_of = min(up(held_out[1][-1]) + 4, height_of - 16)
    text(LEFT + width + 6, height_of, f"{name} {held_out[1][-1]:.1%}", colour=colour)
  size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
  font = 'font-family="sans-serif" font-size="12"'
  white = '<rect width="100%" height="100%" fill="white"/>'
  body = "\n".join([white, *shapes])
  return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n{body}\n</svg>\n'


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("runs", nargs="+", metavar="RUN[=NAME]")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--epochs", type=float, required=True, help="of each run")
  parser.add_argument("--low", type=float, default=0.0, help="accuracy at the lower edge")
  given = parser.parse_args()
  named = (run.partition("=") for run in given.runs)
  found = {name or pathlib.Path(run).name: curves(pathlib.Path(run)) for run, _, name in named}
  given.out.write_text(picture(found, given.epochs, given.low))


if __name__ == "__main__":
  main()
