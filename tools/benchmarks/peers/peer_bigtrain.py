"""bigtrain's own compiled step on random tokens, served as peer_torch.py serves its.

It is run by step_speed.py with a Python that has bigtrain.
"""

import dataclasses
import json
import sys
import time

import jax
import numpy as np

from bigtrain.data.text import TextData
from bigtrain.experiment import Experiment
from bigtrain.models import presets
from bigtrain.models.position import Learned
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.program import Program


def experiment(c: dict) -> Experiment:
  """GPT-2 of another size, on rows of one document each."""
  model = presets.gpt2("124m")
  block = dataclasses.replace(
    model.pattern[0],
    attention=dataclasses.replace(
      model.pattern[0].attention, heads=c["heads"], head_dim=None, kernel=c["kernel"]
    ),
    feed_forward=dataclasses.replace(model.pattern[0].feed_forward, hidden=4 * c["dim"]),
  )
  sizes = {name: c[name] for name in ("vocab", "dim", "layers", "dtype")}
  model = dataclasses.replace(
    model,
    pattern=(block,),
    position=Learned(length=c["length"]),
    # On CPU there is memory enough to keep what the backward pass needs, and a loop costs copies.
    remat="none",
    unroll=c["layers"],
    **sizes,
  )
  return Experiment(
    model=model,
    data=TextData(seq=c["length"]),
    optimizer=AdamW(lr=1e-3, weight_decay=0.1),
    objective=CausalLM(loss_chunk=None),
    steps=10_000,
    batch=c["rows"],
  )


def random_batch(c: dict) -> dict[str, np.ndarray]:
  shape = (c["rows"], c["length"])
  tokens = np.random.default_rng(0).integers(0, c["vocab"], (c["rows"], c["length"] + 1))
  return {
    "tokens": np.int32(tokens[:, :-1]),
    "targets": np.int32(tokens[:, 1:]),
    "positions": np.broadcast_to(np.arange(c["length"], dtype=np.int32), shape),
    "segments": np.ones(shape, np.int32),
    "weights": np.ones(shape, np.float32),
  }


def main() -> None:
  c = json.loads(sys.stdin.readline())
  program, batch = Program(experiment(c), None), random_batch(c)
  spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
  step, batch = program.compile_step(spec), jax.device_put(batch)
  leaves = jax.tree.leaves(program.compile_init()(jax.random.key(0)))
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(int(line)):
      leaves, metrics = step(leaves, batch)
    value = float(metrics["loss"])
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([*seconds, value]), flush=True)


if __name__ == "__main__":
  main()
