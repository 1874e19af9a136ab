"""Speed and memory of `bigtrain data prepare` on corpora of growing size.

python tools/benchmarks/prepare.py --megabytes 4 16
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
from bigtrain.data.prepare.engine import Local
from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.steps import (
  ControlCharacters,
  Repair,
  RepeatedLines,
  Scrub,
  Whitespace,
)

def base() -> Prepare:
  return Prepare(
    inputs=({inputs!r},), tasks={tasks},
    steps=(Repair(), ControlCharacters(), Whitespace(), RepeatedLines(), Scrub()),
    engine=Local(workers=1),
  )
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--megabytes", type=int, nargs="+", default=[4, 16])
  for megabytes in parser.parse_args().megabytes:
    with tempfile.TemporaryDirectory() as folder:
      measure(Path(folder), megabytes)


def measure(folder: Path, megabytes: int) -> None:
  """Prepares random documents of 2 KB, a file a megabyte and a task for each four."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
  (folder / "in").mkdir()
  for i in range(megabytes):
    texts = (" ".join(rng.choices(words, k=310)) for _ in range(500))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "in" / f"{i}.jsonl").write_text(rows)
  tasks = max(1, megabytes // 4)
  (folder / "recipe.py").write_text(RECIPE.format(inputs=str(folder / "in"), tasks=tasks))
  started = time.perf_counter()
  command = [sys.executable, "-m", "bigtrain.cli", "data", "prepare", str(folder / "recipe.py")]
  subprocess.run([*command, "--out", str(folder / "out")], check=True, capture_output=True)
  spent = time.perf_counter() - started
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
  print(f"{megabytes} MB, {tasks} tasks: {spent:.1f} s, peak of a process {peak:.0f} MB")
  for row in json.loads((folder / "out" / "report.json").read_text())["steps"]:
    size = row.get("chars_in") or row.get("read_bytes")
    if size and row.get("seconds"):
      print(f"  {row['name']:<14} {size / 1e6 / row['seconds']:7.1f} MB/s")


if __name__ == "__main__":
  main()
