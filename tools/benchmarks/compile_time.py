"""How long a step takes to compile for TPUs, by layers and by chips: neither should matter.

  python tools/benchmarks/compile_time.py [--layers 2 8 32] [--topologies v5e:2x2 v5e:4x4 v5e:16x16]

The model is a small Llama (512 wide, rows of 1,024 tokens, one a chip), its layers in one loop.
Times are CPU seconds of all threads of this process, tracing included; no cache is used.
"""

import argparse
import time

from bigtrain.plan import topologies
from bigtrain.plan.compile import compile_step

topologies.prepare()

from bigtrain import Experiment  # noqa: E402
from bigtrain.data.text import TextData  # noqa: E402
from bigtrain.models import presets  # noqa: E402
from bigtrain.objectives import CausalLM  # noqa: E402
from bigtrain.optim.adamw import AdamW  # noqa: E402


def study(layers: int, chips: int) -> Experiment:
  model = presets.llama3("1b")
  model.dim, model.layers, model.vocab = 512, layers, 32_768
  model.pattern[0].attention.heads, model.pattern[0].attention.kv_heads = 8, 4
  model.pattern[0].feed_forward.hidden = 2048
  e = Experiment(
    model=model,
    data=TextData(seq=1024),
    optimizer=AdamW(lr=3e-4),
    objective=CausalLM(),
    batch=chips,
    steps=1,
  )
  e.evaluation.batch = chips
  return e


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32])
  parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5e:4x4", "v5e:16x16"])
  args = parser.parse_args()
  print("| layers | topology | chips | CPU s | HLO, MB |")
  print("|---|---|---|---|---|")
  first = args.topologies[0]
  for layers, name in (*((n, first) for n in args.layers), *((2, t) for t in args.topologies[1:])):
    where = topologies.topology(name)
    begin = time.process_time()
    made = compile_step(study(layers, where.chips), where)
    took, size = time.process_time() - begin, len(made.text) / 1e6
    print(f"| {layers} | {name} | {where.chips} | {took:.0f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
  main()
