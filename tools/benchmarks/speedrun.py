"""How much faster than a tuned AdamW experiments/speedrun.py learns: sweep, seeds, ablation, times.

  uv run python tools/benchmarks/speedrun.py sweep     # The baseline's rate, warm-up, decay, ...
  uv run python tools/benchmarks/speedrun.py seeds     # Baseline and record, three seeds each.
  uv run python tools/benchmarks/speedrun.py ablation  # The record without each of its parts.
  uv run python tools/benchmarks/speedrun.py times     # Seconds a step of both, side by side.
  uv run python tools/benchmarks/speedrun.py report    # Tables, and a plot.

Each run is `bigtrain.train` on an experiment of that file, with the whole held-out split evaluated;
its result is a line of OUT/results.jsonl. What is there already is not run again, so a command that
was stopped goes on where it was. `report` prints the tables of docs/speedrun.md.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import bigtrain
from bigtrain.experiment import Experiment
from bigtrain.load import functions
from bigtrain.models.initial import FanIn, Normal
from bigtrain.optim.schedule import Cosine, Linear
from bigtrain.program import Program, enable_compilation_cache

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "speedrun.py"
PLOT = ROOT / "docs" / "images" / "speedrun.svg"
SEEDS = (0, 1, 2)
LIMIT = 0.55  # Of the baseline's steps, and of its time.


@dataclasses.dataclass
class Settings:
  """Measures how much faster the record learns than the baseline."""

  command: tyro.conf.Positional[Literal["sweep", "seeds", "ablation", "times", "report"]]
  out: Path = Path("runs/speedrun")
  minutes: float = 1e9  # No run begins after that; exit code 3 if any is left.
  blocks: int = 30  # Of five steps, of each kind; of `times`.


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A cell of the baseline's sweep."""

  lr: float
  warmup: int = 30  # Steps.
  schedule: str = "cosine"  # To zero.
  weight_decay: float = 0.1
  init: str = "0.02"  # Standard deviation; or "fan in", 1 / sqrt(inputs).
  b2: float = 0.95
  clip: float | None = 1.0

  def apply(self, e: Any) -> None:
    fall = {"cosine": Cosine, "linear": Linear}[self.schedule]
    e.optimizer.schedule = fall(warmup=self.warmup, final=0.0)
    e.optimizer.lr, e.optimizer.weight_decay = self.lr, self.weight_decay
    e.optimizer.b2, e.optimizer.clip = self.b2, self.clip
    fan_in = self.init == "fan in"
    e.model.init = FanIn(residual="scaled") if fan_in else Normal(std=float(self.init))

  def __str__(self) -> str:
    return " | ".join(map(str, dataclasses.astuple(self)))


# Coordinate by coordinate: each group of cells goes out from the best of those before it.
SWEEP = (
  *(Tuning(lr) for lr in (2e-3, 4e-3, 8e-3)),
  *(Tuning(4e-3, init=init) for init in ("0.05", "0.1", "fan in")),
  *(Tuning(lr, init="0.05") for lr in (2e-3, 8e-3)),
  *(Tuning(4e-3, warmup, init="0.05") for warmup in (10, 60, 100)),
  *(Tuning(lr, 60, "linear", init="0.05") for lr in (3e-3, 4e-3, 5.5e-3, 8e-3)),
  *(Tuning(5.5e-3, warmup, "linear", init="0.05") for warmup in (100, 30)),
  Tuning(5.5e-3, 60, "cosine", init="0.05"),
  *(Tuning(5.5e-3, 60, "linear", decay, "0.05") for decay in (0.0, 0.3)),
  *(Tuning(5.5e-3, 60, "linear", init=init) for init in ("0.035", "0.07")),
  *(Tuning(5.5e-3, 60, "linear", init="0.05", b2=b2) for b2 in (0.9, 0.98)),
  Tuning(5.5e-3, 60, "linear", init="0.05", clip=None),
)
BEST = Tuning(5.5e-3, 60, "linear", init="0.05")


def plain_optimizer(e: Any) -> None:
  e.optimizer = functions(STUDY)["base"]().optimizer
  e.optimizer.schedule.warmup //= 2


def gated(e: Any) -> None:
  e.model.pattern[0].feed_forward = functions(STUDY)["base"]().model.pattern[0].feed_forward


# What the record is without one of its parts.
ABLATION: dict[str, Callable[[Any], Any]] = {
  "Muon: AdamW as tuned, half the warm-up": plain_optimizer,
  "shift": lambda e: setattr(e.model, "shift", False),
  "norms of queries and keys": lambda e: setattr(e.model.pattern[0].attention, "qk_norm", None),
  "squared ReLU: SwiGLU": gated,
  "blocks that start as the identity": lambda e: setattr(e.model, "init", Normal(std=0.05)),
  "less momentum: 0.95, and 0.9 of Adam": lambda e: (
    setattr(e.optimizer, "momentum", 0.95),
    setattr(e.optimizer, "b1", 0.9),
  ),
}


def studies(name: str) -> list[tuple[str, int, Callable[[], Any]]]:
  """(name, seed, experiment) of every run of a study."""
  made = functions(STUDY)
  if name == "seeds":
    return [(which, seed, made[which]) for which in ("base", "record") for seed in SEEDS]
  changes = {str(cell): cell.apply for cell in SWEEP} if name == "sweep" else ABLATION
  of = made["base" if name == "sweep" else "record"]  # Evaluated at the end alone.

  def changed(change) -> Callable[[], Any]:
    def make():
      e = of()
      e.evaluation.every = 0
      change(e)
      return e

    return make

  return [(said, SEEDS[0], changed(change)) for said, change in changes.items()]


def run(e: Any) -> dict[str, Any]:
  """Trains in a directory that is thrown away. Losses are of the whole held-out split."""
  e.logging.layers_every, e.logging.tensorboard = 0, False
  e.evaluation.prompts, e.checkpoints.every = (), e.steps
  begun = time.perf_counter()
  with tempfile.TemporaryDirectory() as directory:
    done = bigtrain.train(e, directory, quiet=True)
    curve = zip(done.evaluations["step"], done.evaluations["eval/validation/loss"], strict=True)
    return {
      "seconds": time.perf_counter() - begun,
      "parameters": sum(x.size for x in jax.tree.leaves(done.state.model)),
      "steps": e.steps,
      "curve": [(int(step), float(loss)) for step, loss in curve],
    }


def results(c: Settings) -> dict[tuple, dict[str, Any]]:
  """What was measured so far, by (study, name, seed)."""
  file = c.out / "results.jsonl"
  rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
  return {(row["study"], row["name"], row["seed"]): row for row in rows}


def keep(c: Settings, study: str, name: str, seed: int, found: dict[str, Any]) -> None:
  c.out.mkdir(parents=True, exist_ok=True)
  row = {"study": study, "name": name, "seed": seed} | found
  with (c.out / "results.jsonl").open("a") as file:
    file.write(json.dumps(row) + "\n")


def study(c: Settings) -> None:
  """The runs of a study that are not yet there."""
  begun, there = time.monotonic(), results(c)
  for name, seed, make in studies(c.command):
    if (c.command, name, seed) in there:
      continue
    if time.monotonic() - begun > 60 * c.minutes:
      sys.exit(3)
    e = make()
    e.seed = seed
    found = run(e)
    keep(c, c.command, name, seed, found)
    print(
      f"{name}, seed {seed}: {found['curve'][-1][1]:.4f} in {found['seconds']:.0f} s", flush=True
    )


def times(c: Settings) -> None:
  """Seconds a step of both, in alternating blocks, so that noise of the machine meets both."""
  made = functions(STUDY)
  steps: dict[str, Any] = {}
  for name in ("base", "record"):
    e: Experiment = made[name]()
    program, data = Program(e, None), e.data.make(e.seed)
    leaves = jax.tree.leaves(program.compile_init()(jax.random.key(e.seed)))
    batches = [jax.device_put(data.batch(i * e.batch, e.batch)) for i in range(5)]
    steps[name] = [program.compile_step(data.spec(e.batch)), leaves, batches]
  seconds: dict[str, list[list[float]]] = {name: [] for name in steps}
  for _ in range(c.blocks + 1):
    for name, state in steps.items():
      wall, cpu = time.perf_counter(), time.process_time()
      for batch in state[2]:
        state[1], metrics = state[0](state[1], batch)
      jax.block_until_ready(metrics)
      seconds[name].append([(time.perf_counter() - wall) / 5, (time.process_time() - cpu) / 5])
  keep(c, "times", "both", 0, {name: blocks[1:] for name, blocks in seconds.items()})


def report(c: Settings) -> None:
  """Prints the tables, and draws validation loss against steps."""
  there = results(c)
  last = lambda row: row["curve"][-1][1]
  of = lambda study, name: [row for key, row in there.items() if key[:2] == (study, name)]
  columns = "rate", "warm-up", "schedule", "weight decay", "initial width", "b2", "clip", "loss"
  print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
  for cell in SWEEP:
    for row in of("sweep", str(cell)):
      print(f"| {cell} | {last(row):.4f} |")
  base, record = of("seeds", "base"), of("seeds", "record")
  target = statistics.mean(map(last, base))
  print(f"\ntarget {target:.4f}\n\n| | parameters | steps | loss, by seed | mean | s, by seed |")
  print("|---" * 6 + "|")
  for name, rows in (("base", base), ("record", record)):
    losses = ", ".join(f"{last(row):.4f}" for row in rows)
    seconds = ", ".join(f"{row['seconds']:.0f}" for row in rows)
    mean = statistics.mean(map(last, rows))
    size = f"{rows[0]['parameters']:,} | {rows[0]['steps']}"
    print(f"| `{name}` | {size} | {losses} | {mean:.4f} | {seconds} |")
  (blocks,) = of("times", "both")
  share = record[0]["steps"] / base[0]["steps"]
  print("\n| | ms a step | CPU ms a step |\n|---|---|---|")
  for name in ("base", "record"):
    wall, cpu = (1e3 * statistics.median(times) for times in zip(*blocks[name], strict=True))
    print(f"| `{name}` | {wall:.1f} | {cpu:.1f} |")
  pairs = list(zip(blocks["base"], blocks["record"], strict=True))
  for i, kind in enumerate(("wall", "CPU")):
    low, ratio, high = statistics.quantiles([r[i] / b[i] for b, r in pairs])
    print(
      f"\n{kind}: a step takes {ratio:.3f} of the baseline's (quartiles {low:.3f}, {high:.3f});"
    )
    print(f"steps {share:.3f}, time {share * ratio:.3f}, limit {LIMIT}")
  print("\n| without | loss | more |\n|---|---|---|")
  for name in ABLATION:
    for row in of("ablation", name):
      print(f"| {name} | {last(row):.4f} | {last(row) - last(record[0]):+.4f} |")
  PLOT.write_text(picture({"base": base, "record": record}, target))


# The picture: steps to the right, loss upwards.
WIDTH, HEIGHT, EDGE, LOW, HIGH = 480, 300, 50, 3.9, 6.1
COLOURS = {"base": "#888888", "record": "#0b6bb0"}


def picture(runs: dict[str, list[dict]], target: float) -> str:
  """The SVG: held-out loss of every run."""
  end = runs["base"][0]["steps"]
  x = lambda step: EDGE + WIDTH * step / end
  y = lambda loss: EDGE / 2 + HEIGHT * (HIGH - min(loss, HIGH)) / (HIGH - LOW)

  def text(at_x, at_y, said, colour="#000000", anchor="middle") -> str:
    place = f'x="{at_x:.0f}" y="{at_y:.0f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{said}</text>'

  def line(points, colour, more="") -> str:
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {more}/>'

  parts = []
  for loss in (4.0, 4.5, 5.0, 5.5, 6.0):
    parts += [line([(0, loss), (end, loss)], "#dddddd"), text(EDGE - 20, y(loss) + 4, loss)]
  parts += [text(x(step), EDGE / 2 + HEIGHT + 18, step) for step in range(0, end + 1, 50)]
  parts.append(text(x(end / 2), EDGE / 2 + HEIGHT + 38, "steps; held-out loss, nats a token"))
  parts.append(line([(0, target), (end, target)], "#000000", 'stroke-dasharray="2 3"'))
  for name, rows in runs.items():
    parts += [line(row["curve"], COLOURS[name]) for row in rows]
    step, loss = rows[0]["curve"][0]
    parts.append(text(x(step) + 12, y(loss) - 4, name, COLOURS[name], "start"))
  size = f"0 0 {WIDTH + 2 * EDGE} {HEIGHT + 2 * EDGE}"
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif"'
  body = [f'{head} font-size="12">', '<rect width="100%" height="100%" fill="#fff"/>']
  return "\n".join([*body, *parts, "</svg>"]) + "\n"


def main(c: Settings) -> None:
  enable_compilation_cache()
  {"times": times, "report": report}.get(c.command, study)(c)


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
