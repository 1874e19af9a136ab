"""Speed and memory of `bigtrain data prepare`, by step and by stage, on corpora of growing size.

python tools/benchmarks/prepare.py --megabytes 8 32

The documents are paragraphs of the novels of Jane Austen, drawn at random, a file a megabyte; a
tenth are copies of others, a tenth copies with a word replaced, and every third begins with one
menu. A task has 4 MB, and two processes work.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigtrain.data.sources import Austen, Document

RECIPE = """
from bigtrain.data.prepare.engine import Local
from bigtrain.data.prepare.quality import C4, FineWeb, Gopher, GopherRepetition, Language
from bigtrain.data.prepare.recipe import Prepare, SharedLines
from bigtrain.data.prepare.steps import ControlCharacters, Repair, RepeatedLines, Scrub, Whitespace

def base() -> Prepare:
  return Prepare(
    inputs=({inputs!r},), tasks={tasks}, lines=SharedLines(),
    steps=(
      Repair(), ControlCharacters(), Whitespace(), RepeatedLines(), Language(), Gopher(),
      GopherRepetition(), C4(), FineWeb(), Scrub(),
    ),
    engine=Local(workers=2),
  )
"""
MENU = "Home | About us | Contact | Imprint of this site."


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 32])
  parser.add_argument("--task_megabytes", type=int, default=4)
  given = parser.parse_args()
  for megabytes in given.megabytes:
    with tempfile.TemporaryDirectory() as folder:
      tasks = max(1, megabytes // given.task_megabytes)
      measure(Path(folder), megabytes, tasks)


def documents(rng: random.Random, count: int):
  """Made-up web pages of real sentences."""
  chapters = [d.text for d in Austen().documents(lambda _: None) if isinstance(d, Document)]
  paragraphs = [" ".join(p.split()) for text in chapters for p in text.split("\n\n")]
  paragraphs = [p for p in paragraphs if len(p) > 200]
  made: list[str] = []
  for i in range(count):
    text = "\n".join(rng.choices(paragraphs, k=7))
    if made and i % 10 == 4:
      text = rng.choice(made)
    elif made and i % 10 == 7:
      words = rng.choice(made).split(" ")
      words[len(words) // 2] = "indeed"
      text = " ".join(words)
    elif i % 3 == 0:
      text = f"{MENU}\n{text}"
    made.append(text)
    yield text


def measure(folder: Path, megabytes: int, tasks: int) -> None:
  (folder / "in").mkdir()
  source, size = documents(random.Random(0), 10**9), 0
  for i in range(megabytes):
    with (folder / "in" / f"{i:04}.jsonl").open("w") as file:
      while size < (i + 1) * 1e6:
        size += file.write(json.dumps({"text": next(source)}) + "\n")
  (folder / "recipe.py").write_text(RECIPE.format(inputs=str(folder / "in"), tasks=tasks))
  started = time.perf_counter()
  command = [sys.executable, "-m", "bigtrain.cli", "data", "prepare", str(folder / "recipe.py")]
  subprocess.run([*command, "--out", str(folder / "out")], check=True, capture_output=True)
  spent = time.perf_counter() - started
  report = json.loads((folder / "out" / "report.json").read_text())
  print(f"\n{megabytes} MB, {tasks} tasks, {spent:.0f} s; {report['kept']:,} documents kept")
  print("  step                 MB/s of a core")
  for row in report["steps"]:
    if bytes_in := row.get("read_bytes") or row.get("chars_in"):
      print(f"  {row['name']:<20} {bytes_in / 1e6 / row['seconds']:8.2f}")
  print("  stage                MB/s of a core   peak MB of a process")
  for row in report["stages"]:
    speed = megabytes / row["seconds"]
    print(f"  {row['name']:<20} {speed:8.2f} {row['peak_bytes'] / 1e6:15.0f}")


if __name__ == "__main__":
  main()
