"""Wrong numbers in a run: not applied, recorded, and the run goes on."""

import random
import time
from collections.abc import Iterator

from bigtrain.exit_codes import Exit
from tests import runs
from tools.faults.bench import STEPS, Bench, finish, start, steps_of
from tools.faults.result import Result, compared
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


ON_EIGHT = ("--mesh.data", "8", "--mesh.fsdp", "1")


def device(bench: Bench, times: int, seed: int) -> Iterator[Result]:
  """What one of eight devices holds is wrong; it has to be named before that is saved."""
  eight = {"file": FILE, "JAX_NUM_CPU_DEVICES": "8"}
  whole = bench.new()
  finish(start(whole, *STEPS, *ON_EIGHT, **eight))
  for i in range(times):
    step, path = random.Random(seed + i).randrange(10, 50), bench.new()
    ended = finish(start(path, *STEPS, *ON_EIGHT, **eight, WRONG=f"device {step}"))
    told = runs.events(path, "bad_device")
    saved = max(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdecimal())
    named = bool(told) and "device 7" in told[0]["found"] and saved <= step
    began, done = time.monotonic(), steps_of(path)
    again = finish(start(path, *STEPS, *ON_EIGHT, **eight))
    wrong_rows = compared(runs.values(path), runs.values(whole))
    yield Result(
      "device-output", seed + i,
      f"behind step {step}: code {ended.codes[0]}, {[e['found'][:90] for e in told]}",
      kept=ended.codes == [Exit.CHECK] and named and again.codes == [Exit.DONE]
      and not any(wrong_rows.values()),
      recovery=round(time.monotonic() - began, 1), again=done - saved, **wrong_rows,
    )  # fmt: skip


def same(row: dict) -> list:
  return [row[name] for name in sorted(row) if name not in SPEED]
