"""The best learning rate by width, with muP and without: the sweep of docs/mup.md and its picture.

  python tools/benchmarks/mup.py sweep [--minutes 5]    # Again and again, until it says `done`.
  python tools/benchmarks/mup.py plot

Every run is experiments/mup.py at another width and learning rate; data and their order are the
same. Its loss is the mean of the last ten updates. Results are appended to a file, one JSON object
a line, and what is there is not run again.
"""

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from bigtrain.load import load
from bigtrain.program import Program

ROOT = Path(__file__).parents[2]
WIDTHS = (128, 256, 512, 1024)
KINDS: tuple[Literal["standard", "muP"], ...] = ("standard", "muP")
LAST = 10  # Updates whose mean loss is the run's.


@dataclasses.dataclass
class Sweep:
  """Runs what is missing, narrow models first."""

  results: Path = Path("runs/mup.jsonl")
  kinds: tuple[Literal["standard", "muP"], ...] = KINDS
  widths: tuple[int, ...] = WIDTHS
  exponents: tuple[int, ...] = (-13, -12, -11, -10, -9, -8, -7, -6, -5)  # Of 2, the rates.
  minutes: float = 5.0  # No run begins after that.


@dataclasses.dataclass
class Plot:
  """Draws the picture, and prints the best rates."""

  results: Path = Path("runs/mup.jsonl")
  picture: Path = ROOT / "docs" / "images" / "mup.svg"


def experiment(kind: str, width: int) -> Any:
  """The study's base at another width, and, if standard, without Mup."""
  e: Any = load(str(ROOT / "experiments" / "mup.py"))[0]
  e.model.dim, e.model.pattern[0].feed_forward.hidden = width, 4 * width
  if kind == "standard":
    e.model.init = e.model.init.at_base
  return e


def compiled(e: Any):
  """The first state, and the step: `(state, batch, lr) -> state, metrics`."""

  def step(state, batch, lr):
    traced = copy.deepcopy(e)
    traced.optimizer.lr = lr  # One program for all rates.
    return Program(traced, None).step(state, batch)

  return Program(e, None).compile_init(), jax.jit(step, donate_argnums=0)


def sweep(c: Sweep) -> None:
  begun = time.monotonic()
  c.results.parent.mkdir(parents=True, exist_ok=True)
  done = {(r["kind"], r["width"], r["exponent"]) for r in read(c.results)}
  for width in c.widths:
    for kind in c.kinds:
      missing = [x for x in c.exponents if (kind, width, x) not in done]
      if not missing:
        continue
      e = experiment(kind, width)
      init, step = compiled(e)
      data = e.data.make(e.seed)
      batches = [data.batch(i * e.batch, e.batch) for i in range(e.steps)]
      for exponent in missing:
        if time.monotonic() - begun > 60 * c.minutes:
          print("time is over; run me again")
          return
        state, losses = init(jax.random.key(e.seed)), []
        for batch in batches:
          state, metrics = step(state, batch, 2.0**exponent)
          losses.append(metrics["loss"])
        loss = float(np.mean(jax.device_get(losses[-LAST:])))
        row = {"kind": kind, "width": width, "exponent": exponent, "loss": loss}
        with c.results.open("a") as file:
          file.write(json.dumps(row) + "\n")
        print(row, f"{time.monotonic() - begun:.0f} s", flush=True)
  print("done")


def read(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# The picture: (x, y) of its points are (exponent, loss), in a panel for each kind.
LOW, HIGH, LEFT, RIGHT = 2.3, 3.3, -13, -5
PANEL, HEIGHT, GAP, EDGE = 380, 300, 50, 60  # Pixels.
COLOURS = dict(zip(WIDTHS, ("#a6c8e4", "#5a9bcf", "#2166ac", "#08306b"), strict=True))


def plot(c: Plot) -> None:
  rows = read(c.results)
  parts = []
  for i, kind in enumerate(KINDS):
    parts += panel(kind, EDGE + i * (PANEL + GAP), [r for r in rows if r["kind"] == kind])
  size = f"0 0 {EDGE + len(KINDS) * (PANEL + GAP)} {HEIGHT + 125}"
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif"'
  body = "\n".join([f'{head} font-size="13">', '<rect width="100%" height="100%" fill="#fff"/>'])
  c.picture.write_text("\n".join([body, *parts, "</svg>"]) + "\n")


def panel(kind: str, left: float, rows: list[dict]) -> list[str]:
  """Axes, a curve for each width, and a circle at its best rate."""
  top = 40
  x = lambda exponent: left + PANEL * (exponent - LEFT) / (RIGHT - LEFT)
  y = lambda loss: top + HEIGHT * (HIGH - min(loss, HIGH)) / (HIGH - LOW)
  names = {"standard": "standard parametrisation", "muP": "muP (base 128)"}
  parts = [text(left + PANEL / 2, 22, names[kind], size=15), text(left - 20, 22, "loss")]
  for exponent in range(LEFT, RIGHT + 1):
    parts.append(text(x(exponent), top + HEIGHT + 20, f"2<tspan dy='-5'>{exponent}</tspan>"))
  parts.append(text(left + PANEL / 2, top + HEIGHT + 45, "learning rate"))
  for tenth in range(round(10 * LOW), round(10 * HIGH) + 1, 2):
    at = y(tenth / 10)
    parts.append(f'<path d="M{left} {at:.1f}h{PANEL}" stroke="#ddd"/>')
    parts.append(text(left - 8, at + 4, f"{tenth / 10:.1f}", anchor="end"))
  for i, width in enumerate(WIDTHS):
    of = sorted((r["exponent"], r["loss"]) for r in rows if r["width"] == width)
    shown = [(e, loss) for e, loss in of if loss <= HIGH]
    points = " ".join(f"{x(e):.1f},{y(loss):.1f}" for e, loss in shown)
    style = f'fill="none" stroke="{COLOURS[width]}" stroke-width="2.5"'
    parts.append(f'<polyline points="{points}" {style}/>')
    loss, best = min((loss, e) for e, loss in of)
    parts.append(f'<circle cx="{x(best):.1f}" cy="{y(loss):.1f}" r="5" fill="{COLOURS[width]}"/>')
    place = left + PANEL * (i + 0.5) / len(WIDTHS)
    parts.append(text(place, top + HEIGHT + 70, f"width {width}", fill=COLOURS[width]))
    print(f"{kind:9} width {width:5}: best rate 2**{best}, loss {loss:.3f}")
  return parts


def text(x: float, y: float, words: str, anchor="middle", size=13, fill="#333") -> str:
  place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
  return f'<text {place} font-size="{size}" fill="{fill}">{words}</text>'


if __name__ == "__main__":
  command = tyro.cli(Sweep | Plot, description=__doc__)  # pyright: ignore[reportArgumentType]
  sweep(command) if isinstance(command, Sweep) else plot(command)
