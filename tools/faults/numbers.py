"""Wrong numbers in a run: not applied, recorded, and the run goes on."""

import random
from collections.abc import Iterator

from bigtrain.exit_codes import Exit
from tests import runs
from tools.faults.bench import STEPS, Bench, finish, start
from tools.faults.result import Result
from tools.faults.whole import Fault

FILE = "tools/faults/wrong_numbers.py"
KINDS = ("nan-data", "huge-data", "nan-gradient", "huge-gradient")
SPEED = {*runs.SPEED, "data_digest"}  # Of what was spoiled too.


def wrong(kind: str) -> Fault:
  """In the batch of a random step behind the first twelve."""

  def fault(bench: Bench, times: int, seed: int) -> Iterator[Result]:
    rng = random.Random(seed)
    quiet = runs.read(bench.quiet(file=FILE), "metrics.jsonl")
    for i in range(times):
      step, path = rng.randrange(12, int(STEPS[1])), bench.new()
      ended = finish(start(path, *STEPS, file=FILE, WRONG=f"{kind} {8 * step}"))
      rows = runs.read(path, "metrics.jsonl")
      skipped = [r["step"] for r in rows if r["kind"] == "train" and r["skipped"]]
      incidents = runs.events(path, "incident")
      told = [(e["step"], e["kind"], e["cause"]) for e in incidents]
      before = [same(r) for r in rows if r["step"] <= step]
      lost = sum(r not in before for r in (same(r) for r in quiet if r["step"] <= step))
      finite = all(r["loss"] is not None for r in rows if r["kind"] == "train" and not r["skipped"])
      kept = ended.codes == [Exit.DONE] and skipped == [step + 1] and finite and not lost
      # The same once more: what was decided depends on nothing else.
      other = bench.new()
      finish(start(other, *STEPS, file=FILE, WRONG=f"{kind} {8 * step}"))
      repeated = len(set(runs.values(path)) ^ set(runs.values(other)))
      yield Result(
        kind, seed + i,
        f"in step {step + 1}: code {ended.codes[0]}, not applied {skipped}, incidents {told}"
        + ("" if ended.codes == [Exit.DONE] else f", {ended.errors[0][-200:]}"),
        kept=kept and not repeated and [t[0] for t in told] == [step + 1],
        lost=lost, repeated=repeated,
      )  # fmt: skip

  return fault


def same(row: dict) -> list:
  return [row[name] for name in sorted(row) if name not in SPEED]
