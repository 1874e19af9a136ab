"""How often `bigtrain diagnose` is right, on runs of which it is known what they are sick of.

uv run python tools/benchmarks/diagnose.py [--which second] [--out runs/diagnosed] [--only NAME]

Trains the configurations of sick_and_healthy.py, each for seconds, and prints a table. What has
been trained in --out is only diagnosed again. The chip's peak is what this machine reaches in a
large float32 product, so that a CPU too has an MFU.
"""

import collections
import dataclasses
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import sick_and_healthy
import tyro
from rich.console import Console
from rich.table import Table
from sick_and_healthy import Case

from bigtrain import metrics
from bigtrain.diagnose import Finding, diagnose, read
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train

# Shares of time that were measured: true of any run of which they are told, so no false alarms.
MEASURED = ("input-bound", "compile-bound", "chip not filled")
GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "diagnosed.json.gz"


@dataclasses.dataclass
class Settings:
  """Judges the diagnosis on runs whose sickness is known."""

  which: Literal["first", "second"] = "second"  # Of the sets of configurations.
  out: str = "runs/diagnosed"  # Where the runs are.
  only: str = ""  # Those in whose name this is found.
  golden: bool = False  # Keep the records of both sets, for tests/test_diagnose.py.


def main(c: Settings) -> None:
  if c.golden:
    write_golden(Path(c.out))
    return
  metrics.PEAK["cpu"] = peak()
  cases = getattr(sick_and_healthy, c.which)()
  found = {}
  with tempfile.TemporaryDirectory() as cache:
    # A compilation that comes from disk would not dominate anything.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    jax.config.update("jax_compilation_cache_dir", cache)
    for name, case in cases.items():
      if c.only in name:
        found[name] = findings(case, Path(c.out) / c.which / name)
        print(name, *found[name], sep="\n  ", flush=True)
  Console(width=100).print(table(cases, found))
  Console(width=100).print(figures(cases, found))


def findings(case: Case, folder: Path) -> list[Finding]:
  """What is found of a run, which is made first if it is not there."""
  directory = RunDirectory(folder, writes=False)
  if not any(event["event"] == "end" for event in directory.events()):
    started = time.perf_counter()
    train(case.make(), folder, quiet=True)
    print(f"{folder.name}: {time.perf_counter() - started:.0f} s")
  return diagnose(read(folder))


def write_golden(out: Path) -> None:
  """Every run in `out`, its rows with four digits, and what is expected of it."""
  runs = {}
  for which in ("first", "second"):
    for name, case in getattr(sick_and_healthy, which)().items():
      directory = RunDirectory(out / which / name, writes=False)
      runs[f"{which}: {name}"] = {
        "expected": case.expected,
        "also": case.also,
        "rows": [rounded(row) for k in ("train", "eval", "layers") for row in directory.rows(k)],
        "events": [
          {k: event[k] for k in ("event", "time", "seconds") if k in event}
          for event in directory.events()
        ],
      }
  # A fixed time of writing: the same records are the same bytes.
  GOLDEN.write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))


def rounded(row: dict) -> dict:
  return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def table(cases: dict[str, Case], found: dict[str, list[Finding]]) -> Table:
  shown = Table("configuration", "expected", "found")
  for name, findings in found.items():
    case = cases[name]
    kinds = [finding.kind for finding in findings]
    right = set(kinds) <= {case.expected, *case.also, *MEASURED} and case.expected in {*kinds, None}
    mark = "" if right else "[red]x[/red] "
    shown.add_row(name, case.expected or "-", mark + (", ".join(kinds) or "-"))
  return shown


def figures(cases: dict[str, Case], found_of: dict[str, list[Finding]]) -> Table:
  """Precision (how many of a kind that were found are there) and recall, by kind of finding."""
  there, seen, right, wrong = (collections.Counter() for _ in range(4))
  for name, findings in found_of.items():
    case, kinds = cases[name], {finding.kind for finding in findings}
    there[case.expected] += 1
    right[case.expected] += case.expected in kinds
    for kind in kinds:
      seen[kind] += 1
      wrong[kind] += kind not in (case.expected, *case.also, *MEASURED)
  shown = Table("finding", "sick of it", "found", "false alarms", "precision", "recall")
  kinds = sorted({*filter(None, there), *seen})
  for name, some in (
    *((kind, [kind]) for kind in kinds),
    ("all but measured shares of time", [kind for kind in kinds if kind not in MEASURED]),
  ):
    n, found_n, false_n, right_n = (sum(c[k] for k in some) for c in (there, seen, wrong, right))
    precision = f"{1 - false_n / found_n:.0%}" if found_n else "-"
    recall = f"{right_n / n:.0%}" if n else "-"
    shown.add_row(name, *map(str, (n, found_n, false_n)), precision, recall)
  return shown


def peak() -> float:
  """FLOP/s of a large float32 product, at its best of ten."""
  n = 2048
  a = jnp.ones((n, n))
  product, best = jax.jit(jnp.matmul), float("inf")
  product(a, a).block_until_ready()
  for _ in range(10):
    started = time.perf_counter()
    product(a, a).block_until_ready()
    best = min(best, time.perf_counter() - started)
  return 2 * n**3 / best


if __name__ == "__main__":
  main(tyro.cli(Settings, description=__doc__))
