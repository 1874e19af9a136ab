"""The fault-injection suite: python -m tools.faults [--only ID ...] [--times N] [--short] [--table]

Results are appended to a file as they come, so that it can be run in parts.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
# A busy machine is no deadlock: what jax ends after 40 s may only be slow.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=300")

from tests import runs
from tools.faults.result import Result
from tools.faults.suite import SUITE
from tools.faults.suite import results as results_of

RESULTS = Path(__file__).with_name("results.jsonl")
TORMENT = "goes on by itself, or when its supervisor is started again; no verified step is lost"


def table(path: Path) -> str:
  """What was found, as Markdown: a row for each kind of fault that was made."""
  found = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
  names = [*SUITE, *sorted({r.fault for r in found} - SUITE.keys())]
  head = ["fault", "promised", "trials", "kept", "lost rows", "repeated", "done again", "recovery"]
  lines = [head, ["---"] * len(head)]
  for name in names:
    if not (own := [r for r in found if r.fault == name]):
      continue
    promised = SUITE[name].promised if name in SUITE else TORMENT
    counts = [len(own), *(sum(getattr(r, field) for r in own) for field in ("kept", "lost"))]
    more = [sum(r.repeated for r in own), f"{max(r.again for r in own)} steps at most"]
    longest = max(r.recovery for r in own)
    lines.append([f"`{name}`", promised, *counts, *more, f"{longest:.1f} s at most"])
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", nargs="+", choices=SUITE, default=list(SUITE), metavar="ID")
  parser.add_argument("--times", type=int, help="instead of what the suite says")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--results", type=Path, default=RESULTS)
  parser.add_argument("--short", action="store_true", help="about four minutes")
  parser.add_argument("--table", action="store_true", help="print what is in the results, and end")
  flags = parser.parse_args()
  if flags.table:
    print(table(flags.results))
    return
  with tempfile.TemporaryDirectory(prefix="faults-") as folder:
    runs.prepare(Path(folder))
    for name in flags.only:
      row, began, kept = SUITE[name], time.monotonic(), []
      if not (times := flags.times or (row.short if flags.short else row.times)):
        continue
      (Path(folder) / name).mkdir()
      for result in results_of(name, Path(folder) / name, times, flags.seed):
        result.append(flags.results)
        kept.append(result.kept)
        if not result.kept:
          print(result, flush=True)
      seconds = time.monotonic() - began
      print(f"{name}: {sum(kept)} of {len(kept)} kept, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
  main()
