"""The planner's estimate of any optimized HLO text, such as another code base's compiled step.

  python tools/benchmarks/plan_hlo.py step.hlo.txt --topology v5p:2x2x4 --mesh fsdp=16

The model is that of `bigtrain plan`, so that two programs compare: the compiler's cycles with
loops counted, attention kernels at 60% of peak, links. `--mesh` names the axes of the program's
mesh, slowest first, over the topology's chips in order.
"""

import argparse
import pathlib
import re

import numpy as np

from bigtrain.plan import cost, hlo, live
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import topology


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("hlo", type=pathlib.Path)
  parser.add_argument("--topology", required=True)
  parser.add_argument("--mesh", nargs="*", default=[], help="AXIS=SIZE")
  parser.add_argument("--scopes", type=int, default=20, help="rows of where the time goes")
  parser.add_argument("--instructions", type=int, default=20, help="rows of single instructions")
  args = parser.parse_args()
  where = topology(args.topology)
  axes = {axis: int(n) for axis, n in (part.split("=") for part in args.mesh)}
  places = np.asarray(list(np.ndindex(where.shape[::-1])))[:, ::-1]  # As jax orders chips.
  links = Network(where, axes or {"all": where.chips}, places, np.zeros(where.chips, int))
  module = hlo.parse(args.hlo.read_text())
  found = cost.estimate(module, links)
  print(f"step {found.step:.4f} s, of which uncounted {found.uncounted:.4f}")
  if found.loops:
    print(f"{found.loops} loops have no known count: their bodies are counted once")
  for part, seconds in found.seconds.items():
    print(f"  {part:<8} {seconds:.4f}")
  print(
    f"products {found.flops / 1e12:.1f} TFLOP, {found.flops / found.step / where.chip.bf16:.1%}"
  )
  print(f"peak {sum(b.bytes for b in live.at_peak(module)) / 2**30:.2f} GiB, as followed here")
  print("\nexposed collectives:")
  for c in sorted(found.collectives, key=lambda c: -c.exposed)[: args.scopes]:
    if c.exposed:
      over = "+".join(c.axes)
      print(f"  {c.exposed:.4f} {c.kind} {over} {c.bytes / 1e6:.1f} MB x {c.times} {c.scope}")
  print("\nwhere the time goes:")
  for scope, seconds in sorted(found.scopes.items(), key=lambda s: -s[1])[: args.scopes]:
    print(f"  {seconds:.4f} {scope}")
  print("\ninstructions that take longest, and how long at the peak of the matrix units:")
  for t in sorted(found.timed, key=lambda t: -t.seconds)[: args.instructions]:
    shape = re.sub(r"\{[^}]*\}", "", t.instruction.shape)
    print(
      f"  {t.seconds:.4f} {t.flops / where.chip.bf16:.4f} {t.part} x {t.times} "
      f"{t.instruction.name} {shape[:90]} {t.instruction.scope[-90:]}"
    )


if __name__ == "__main__":
  main()
