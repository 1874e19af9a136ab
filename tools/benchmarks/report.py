"""How long the report of a long run takes, and how large it is.

The run is made up: its records are those of so many logged steps on 256 chips, killed every few
hours, with 64 layers of which statistics were kept.

    uv run --extra report python tools/benchmarks/report.py --steps 100000
"""

import json
import os
import pathlib
import random
import sys
import tempfile
import time

from bigtrain.config import config
from bigtrain.flags import parse
from bigtrain.report.command import report

PARTS = ("attention", "feed_forward", "attention_norm", "feed_forward_norm")
NAMES = [
  f"{statistic}/transformer.{i:02}.{part}"
  for statistic in ("gradient", "update", "parameter")
  for i in range(64)
  for part in PARTS
]


@config
class Settings:
  """The run that is made up."""

  steps: int = 100_000  # All are logged.
  saved: int = 500  # Steps from one checkpoint to the next.
  evaluated: int = 1_000  # Steps from one evaluation, and look at all layers, to the next.
  lived: int = 4_000  # Steps of a start, about.


def records(c: Settings) -> tuple[list[dict], list[dict]]:
  """(rows, events)."""
  rng, now, done, step = random.Random(0), 1_700_000_000.0, 0, 0
  rows, events = [], []
  while done < c.steps:
    begin = {"event": "restore" if done else "initialise", "step": done, "seconds": 50}
    events.append({"time": now, "event": "start", "processes": 64, "devices": 256, "seconds": 40})
    events.append({"time": now + 60} | begin)
    events.append({"time": now + 180, "event": "compile", "seconds": 110})
    now += 180
    last = min(done + rng.randint(c.lived // 2, 3 * c.lived // 2), c.steps)
    for step in range(done + 1, last + 1):
      now += 2.2
      rows.append(
        {"step": step, "kind": "train", "time": now, "loss": 2 + 8 / step**0.4 + rng.gauss(0, 0.03)}
        | {"gradient_norm": 0.5 + rng.random(), "learning_rate": 3e-4 * (1 - step / c.steps)}
        | {"step_seconds": 2.2, "input_wait_seconds": 0.01, "tokens_per_second": 3.1e6}
        | {"mfu": 0.45 + rng.gauss(0, 0.01), "goodput": 0.9}
      )
      if step % c.saved == 0:
        now += 1
        events.append({"time": now, "event": "save", "step": step, "seconds": 1})
      if step % c.evaluated == 0:
        now += 30
        events.append({"time": now, "event": "evaluate", "step": step, "seconds": 30})
        rows.append({"step": step, "kind": "eval", "eval/validation/loss": 2.1 + 8 / step**0.4})
        rows.append({"step": step, "kind": "layers"} | {name: rng.random() for name in NAMES})
    done = step if step == c.steps else step - step % c.saved
    rows, until, now = [row for row in rows if row["step"] <= done], now, now + 400
    events.append({"time": now, "event": "resume", "step": done, "until": until})
  return rows, events


def main() -> None:
  [c] = parse([Settings()], sys.argv[1:], "report.py", __doc__ or "")
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    for name, lines in zip(("metrics", "events"), records(c), strict=True):
      (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    began, spent = time.perf_counter(), time.process_time()
    made = report([folder])
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    size = os.path.getsize(made)
  print(f"{c.steps:,} steps: {seconds:.1f} s, {spent:.1f} s of a core, {size / 1e3:.0f} kB")


if __name__ == "__main__":
  main()
