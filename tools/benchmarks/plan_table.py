"""Every preset planned once, and every topology: does it fit, and how fast.

  python tools/benchmarks/plan_table.py [--only llama3 v6e ...] [--jobs 2]
  python tools/benchmarks/plan_table.py --calibration

Each plan is a process of its own and is kept in the user's cache, so that the table goes on where
it was left; what does not compile is a row too. With --calibration the rows are recipes whose speed
was published.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from bigtrain import Experiment
from bigtrain.data.folders import ImageFolder
from bigtrain.data.masked import MaskedText
from bigtrain.data.spans import Spans
from bigtrain.data.text import TextData
from bigtrain.data.vision import ImageData
from bigtrain.models import presets
from bigtrain.models.encoder import MaskedLMConfig
from bigtrain.objectives import CausalLM, MaskedLM, SpanCorruption
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adamw import AdamW
from bigtrain.plan.topologies import topology


@dataclasses.dataclass(frozen=True)
class Row:
  """What is planned: a preset as "family:size", where, examples a chip, and overrides."""

  preset: str
  topology: str
  rows: int
  settings: str = ""
  measured: int = 0  # Tokens a second and chip, where that was published.


KEEP = "--model.remat products"
# "slots" in the table: equal ones, for a quarter more than an even share.
DISPATCH = "--model.pattern.0.feed_forward.dispatch"
SLOTS = f"{DISPATCH}.buffer 1.25 {DISPATCH}.exchange all_to_all"
ROWS = (
  Row("gpt2:124m", "v5e:2x2", 8, KEEP),
  Row("gpt2:355m", "v5e:2x2", 4, KEEP),
  Row("gpt2:774m", "v5e:4x4", 4, KEEP),
  Row("gpt2:1.5b", "v5e:4x4", 4),
  Row("gpt3:125m", "v5e:2x2", 4, KEEP),
  Row("gpt3:350m", "v5e:2x2", 2, KEEP),
  Row("gpt3:760m", "v5e:4x4", 2, KEEP),
  Row("gpt3:1.3b", "v5e:4x4", 2, KEEP),
  Row("gpt3:2.7b", "v6e:8x8", 4, KEEP),
  Row("gpt3:6.7b", "v6e:8x8", 4, KEEP),
  Row("gpt3:13b", "v5p:2x2x4", 4, "--mesh.fsdp 4 --mesh.data 4"),  # 5,140 is no multiple of 16.
  Row("gpt3:175b", "v5p:8x8x8", 2),
  Row("llama3:1b", "v5e:16x16", 1, KEEP),
  Row("llama3:3b", "v6e:8x8", 1, KEEP),
  Row("llama3:8b", "v5p:2x2x4", 2, KEEP),
  Row("llama3:8b", "v6e:16x16", 2, "--model.remat qkv"),
  Row("llama3:70b", "v5p:4x4x8", 1, "--model.remat qkv"),
  Row("llama3:405b", "v5p:8x16x16", 1, "--model.remat attention"),
  Row("qwen3:0.6b", "v5e:4x4", 2, KEEP),
  Row("qwen3:8b", "v6e:8x8", 4, KEEP),
  Row("mixtral:8x7b", "v5p:4x4x2", 4, f"--mesh.expert 8 {SLOTS}"),
  Row("mixtral:8x22b", "v5p:4x4x8", 2, f"--mesh.expert 8 {SLOTS}"),
  Row("qwen3_moe:30b-a3b", "v5p:4x4x2", 2, f"--mesh.expert 8 {SLOTS}"),
  Row("qwen3_moe:235b-a22b", "v5p:8x8x8", 1, f"--mesh.expert 16 {SLOTS}"),
  Row("deepseek_v3", "v5p:8x8x8", 1, f"--mesh.expert 32 {SLOTS}"),
  Row("bert:minilm", "v5e:2x2", 64, "--model.encoder.remat products"),
  Row("bert:base", "v5e:2x2", 32, "--model.encoder.remat products"),
  Row("bert:large", "v5e:4x4", 16, "--model.encoder.remat products"),
  Row("t5:small", "v5e:2x2", 32, KEEP),
  Row("t5:base", "v5e:2x2", 16, KEEP),
  Row("t5:large", "v5e:4x4", 8, KEEP),
  Row("t5:xl", "v6e:8x8", 8, KEEP),
  Row("t5:xxl", "v6e:8x8", 8),
  Row("vit:ti/16", "v5e:2x2", 256, KEEP),
  Row("vit:s/16", "v5e:2x2", 128, KEEP),
  Row("vit:b/16", "v5e:4x4", 64, KEEP),
  Row("vit:l/16", "v5e:4x4", 32, KEEP),
  Row("vit:g/14", "v6e:8x8", 32, KEEP),
)
# Measured: MaxText, reference/models/tiering. Rows of 8,192 tokens; what waits in the host's memory
# is that of its benchmark configurations of these names, which for 70b compute the output of
# attention again.
OFFLOAD = "--model.remat qkv --model.offload input q k v"
CALIBRATION = (
  Row("llama3:8b", "v6e:16x16", 4, OFFLOAD, measured=7207),
  Row("llama3:70b", "v6e:16x16", 5, f"{OFFLOAD} --model.recompute attention", measured=960),
)


def base() -> Experiment:
  """What is planned: overrides choose the rest."""
  return experiment("gpt2", "124m")


def experiment(family: str, size: str) -> Experiment:
  """A step of a preset, with the objective and the rows that it was made for."""
  preset: Callable = getattr(presets, family)
  model = preset(size) if size else preset()
  optimizer = AdamW(lr=3e-4)
  made = lambda model, data, objective: Experiment(
    model=model, data=data, objective=objective, optimizer=optimizer, batch=1, steps=1
  )
  if family == "bert":
    return made(MaskedLMConfig(encoder=model), MaskedText(seq=512), MaskedLM())
  if family == "t5":
    return made(model, Spans(seq=512), SpanCorruption())
  if family == "vit":
    images = ImageFolder(train="imagenet", classes=model.classes)
    return made(model, ImageData(source=images, size=model.image), Classification())
  seq = 8192 if family == "llama3" else min(2048, model.longest_row() or 2048)
  return made(model, TextData(seq=seq), CausalLM())


def function(preset: str) -> str:
  """Its name as `bigtrain plan FILE:FUNCTION` has it: letters, digits and underscores."""
  return "".join(c if c.isalnum() else "_" for c in preset)


def __getattr__(name: str) -> Callable[[], Experiment]:
  for row in (*ROWS, *CALIBRATION):
    if function(row.preset) == name:
      family, _, size = row.preset.partition(":")
      return lambda: experiment(family, size)
  raise AttributeError(name)


def plan(row: Row) -> dict:
  """The planner's object, or {"problem": ...}."""
  batch = str(row.rows * topology(row.topology).chips)
  command = [sys.executable, "-W", "ignore", "-m", "bigtrain.cli", "plan"]
  command += [f"{pathlib.Path(__file__)}:{function(row.preset)}", "--topology", row.topology]
  command += ["--json", "--batch", batch, "--evaluation.batch", batch, *row.settings.split()]
  done = subprocess.run(command, capture_output=True, text=True)
  try:
    return json.loads(done.stdout)
  except json.JSONDecodeError:
    return {"problem": done.stderr.strip().splitlines()[-1] if done.stderr else "no answer"}


def line(row: Row, found: dict) -> str:
  settings = row.settings.replace(SLOTS, "slots").replace("--", "")
  what = f"| {row.preset} | {row.topology} | {row.rows} | {settings} |"
  if "step_seconds" not in found:
    return f"{what} {found['problem'].splitlines()[0][:120]} | | | | |"
  memory, parts = found["memory"], found["parts"]
  return (
    f"{what} {found['step_seconds']:.3f} | {found['mfu']:.1%} "
    f"| {memory['peak'] / 2**30:.1f} of {memory['chip'] / 2**30:.1f} "
    f"| {parts['exposed']:.3f} | {found['uncounted_seconds']:.3f} |"
  )


def calibrated(row: Row, found: dict) -> str:
  what = f"| {row.preset} | {row.topology} | {row.rows} | {row.measured} |"
  if "step_seconds" not in found:
    return f"{what} {found['problem'].splitlines()[0][:120]} | |"
  rate = found["tokens_per_second"] / found["topology"]["chips"]
  return f"{what} {rate:.0f} | {rate / row.measured:.2f} |"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", nargs="*", default=[""], help="parts of presets and topologies")
  parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
  parser.add_argument("--calibration", action="store_true", help="published recipes instead")
  args = parser.parse_args()
  asked = CALIBRATION if args.calibration else ROWS
  rows = [r for r in asked if any(part in f"{r.preset} {r.topology}" for part in args.only)]
  if not rows:
    raise SystemExit(f"no row has any of {', '.join(args.only)} in its preset or topology")
  if args.calibration:
    print("| preset | topology | rows a chip | measured, tokens/s and chip | predicted | ratio |")
    print("|---|---|---|---|---|---|")
  else:
    columns = "step, s | MFU | peak, GiB | exposed, s | uncounted, s"
    print(f"| preset | topology | rows a chip | settings | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
  with ThreadPoolExecutor(args.jobs) as pool:
    for row, found in zip(rows, pool.map(plan, rows), strict=True):
      print((calibrated if args.calibration else line)(row, found), flush=True)


if __name__ == "__main__":
  main()
