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
  exponents: tuple[int, ...] = (-11, -10, -9, -8, -7, -6, -5)  # Of 2, the learning rates.
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


if __name__ == "__main__":
  sweep(tyro.cli(Sweep))
