"""Steps whose predicted time is compared with that of other code bases: docs/speed.md.

  bigtrain plan tools/benchmarks/tpu_steps.py:llama3_8b --topology v5p:2x2x4

Each function says for how many chips its batch is: AdamW, bfloat16 compute, float32 weights.
"""

from bigtrain import Experiment
from bigtrain.data.text import TextData
from bigtrain.models import presets
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.parallel.expert import Dropless


def base() -> Experiment:
  """The smallest."""
  return gpt2()


def llama3_8b() -> Experiment:
  """On v5p:2x2x4: 2 rows of 8,192 tokens a chip."""
  e = _step(presets.llama3("8b"), seq=8192, batch=32)
  e.model.remat, e.model.recompute = "products", ("q", "v")
  return e


def llama_1b() -> Experiment:
  """On v5e:4x4: 4 rows of 2,048 tokens a chip."""
  e = _step(presets.llama3("1b"), seq=2048, batch=64)
  e.model.remat, e.model.recompute = "products", ("k", "v")
  return e


def gpt2() -> Experiment:
  """On v5e:2x2: 16 rows of 1,024 tokens a chip."""
  e = _step(presets.gpt2("124m"), seq=1024, batch=64)
  e.model.remat, e.model.recompute = "products", ("q", "k", "v", "residual")
  return e


def mixtral() -> Experiment:
  """On v5p:4x4x2: 8 rows of 4,096 tokens a chip, experts over 8 chips."""
  e = _step(presets.mixtral("8x7b"), seq=4096, batch=256)
  e.model.remat = "full"
  e.model.pattern[0].feed_forward.dispatch = Dropless(buffer=1.25, exchange="all_to_all")
  e.mesh.expert = 8
  return e


def llama3_405b() -> Experiment:
  """On v5p:8x16x16: 1 row of 8,192 tokens a chip."""
  e = _step(presets.llama3("405b"), seq=8192, batch=2048)
  e.model.remat = "attention"
  return e


def _step(model, seq: int, batch: int) -> Experiment:
  data, optimizer, objective = TextData(seq=seq), AdamW(lr=3e-4), CausalLM()
  e = Experiment(
    model=model, data=data, optimizer=optimizer, objective=objective, steps=1, batch=batch
  )
  e.evaluation.batch = batch
  return e
