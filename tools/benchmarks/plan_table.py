"""Every preset of a language model planned once on every topology: does it fit, and how fast.

  python tools/benchmarks/plan_table.py [--presets llama3:8b ...] [--topologies v5p:2x2x4 ...]
  python tools/benchmarks/plan_table.py --calibration

One row of 2,048 tokens a chip (8,192 for Llama), all chips on `fsdp`. Each plan is a process of its
own and is kept in the user's cache, so that the table goes on where it was left; what does not
compile is a row too. With --calibration the rows are recipes whose speed was published.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys

from bigtrain import Experiment, Mesh
from bigtrain.data.text import TextData
from bigtrain.models import presets
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.plan.topologies import topology

PRESETS = (
  *(f"gpt2:{size}" for size in presets.GPT2),
  *(f"gpt3:{size}" for size in presets.GPT3),
  *(f"llama3:{size}" for size in presets.LLAMA3),
  *(f"qwen3:{size}" for size in presets.QWEN3),
)
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x4", "v5p:4x4x8", "v6e:8x8", "v6e:16x16")


@dataclasses.dataclass(frozen=True)
class Published:
  """A measured step: tokens a second and chip. Its source: MaxText, reference/models/tiering."""

  preset: str
  topology: str
  rows: int  # A chip.
  measured: int


# Rows of 8,192 tokens; the batch a chip is that of MaxText's benchmark configuration of that name,
# which also moves activations to the host, and runs its own flags.
CALIBRATION = (
  Published("llama3:8b", "v6e:16x16", 4, 7207),
  Published("llama3:70b", "v6e:16x16", 5, 960),
)


def base() -> Experiment:
  """What is planned: overrides choose the rest."""
  return _experiment("gpt2", "124m")


def _experiment(family: str, size: str) -> Experiment:
  model = getattr(presets, family)(size)
  seq = 8192 if family == "llama3" else min(2048, model.longest_row() or 2048)
  data, optimizer = TextData(seq=seq), AdamW(lr=3e-4)
  e = Experiment(
    model=model, data=data, optimizer=optimizer, objective=CausalLM(), batch=1, steps=1
  )
  e.mesh = Mesh(fsdp=-1)
  return e


def __getattr__(name: str):
  """`gpt2_124m` and its like, the functions that `bigtrain plan FILE:FUNCTION` calls."""
  family, _, size = name.partition("_")
  if f"{family}:{size.replace('_', '.')}" not in PRESETS:
    raise AttributeError(name)

  def made() -> Experiment:
    return _experiment(family, size.replace("_", "."))

  return made


def plan(preset: str, where: str, rows: int) -> dict:
  """The planner's object, or {"problem": ...}."""
  chips = topology(where).chips
  function = preset.replace(":", "_").replace(".", "_")
  command = [sys.executable, "-W", "ignore", "-m", "bigtrain.cli", "plan"]
  command += [f"{pathlib.Path(__file__)}:{function}", "--topology", where, "--json"]
  command += ["--batch", str(rows * chips), "--evaluation.batch", str(rows * chips)]
  done = subprocess.run(command, capture_output=True, text=True)
  try:
    return json.loads(done.stdout)
  except json.JSONDecodeError:
    return {"problem": done.stderr.strip().splitlines()[-1] if done.stderr else "no answer"}


def row(preset: str, where: str, found: dict) -> str:
  if "step_seconds" not in found:
    problem = found["problem"].splitlines()[0]
    return f"| {preset} | {where} | {problem[:80]} | | | | |"
  memory, parts = found["memory"], found["parts"]
  return (
    f"| {preset} | {where} | {found['step_seconds']:.3f} | {found['mfu']:.1%} "
    f"| {memory['peak'] / 2**30:.1f} of {memory['chip'] / 2**30:.1f} "
    f"| {parts['exposed']:.3f} | {found['uncounted_seconds']:.3f} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--presets", nargs="*", default=PRESETS)
  parser.add_argument("--topologies", nargs="*", default=TOPOLOGIES)
  parser.add_argument("--calibration", action="store_true", help="published recipes instead")
  args = parser.parse_args()
  if args.calibration:
    print("| model | topology | measured, tokens/s and chip | predicted | ratio |")
    print("|---|---|---|---|---|")
    for known in CALIBRATION:
      found = plan(known.preset, known.topology, known.rows)
      if "step_seconds" in found:
        rate = found["tokens_per_second"] / found["topology"]["chips"]
        said = f"{rate:.0f} | {rate / known.measured:.2f}"
      else:
        said = f"{found['problem'].splitlines()[0][:80]} |"
      print(f"| {known.preset} | {known.topology} | {known.measured} | {said} |", flush=True)
    return
  print("| model | topology | step, s | MFU | peak, GiB | exposed, s | uncounted, s |")
  print("|---|---|---|---|---|---|---|")
  for preset in args.presets:
    for where in args.topologies:
      print(row(preset, where, plan(preset, where, 1)), flush=True)


if __name__ == "__main__":
  main()
