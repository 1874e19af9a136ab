"""Llama 3 from scratch, at its five sizes (arXiv:2407.21783).

Edit DATA and TOKENIZER: any text, such as FineWeb-Edu, and the tokenizer.json of Llama 3.
"""

import copy
import dataclasses

from bigtrain import Checkpoints, Evaluation, Experiment, Mesh
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import TokenizerFile
from bigtrain.models import presets
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.position import Rotary
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine

DATA = "data/fineweb-edu/**/*.parquet"
TOKENIZER = "data/llama3/tokenizer.json"

ROW = 8192  # Tokens.


def base() -> Experiment:
  """The smallest, llama3_1b."""
  return llama3_1b()


def llama3_1b() -> Experiment:
  """1.24B parameters on 1.0T tokens.

  The released 1b and 3b were distilled, so there is no published recipe for them from scratch: the
  rate is that of OLMo 1B, whose batch has as many tokens (arXiv:2402.00838).
  """
  return _study(presets.llama3("1b"), lr=4e-4, steps=240_000, batch=512)


def llama3_3b() -> Experiment:
  """3.2B parameters on 1.0T tokens; the rate of the 8b."""
  return _study(presets.llama3("3b"), lr=3e-4, steps=240_000, batch=512)


def llama3_8b() -> Experiment:
  """8B parameters on 15T tokens."""
  return _study(presets.llama3("8b"), lr=3e-4, steps=1_800_000, batch=1024)


def llama3_70b() -> Experiment:
  """70B parameters on 15T tokens."""
  return _study(presets.llama3("70b"), lr=1.5e-4, steps=1_800_000, batch=1024)


def llama3_405b() -> Experiment:
  """405B parameters on 17T tokens, with the paper's schedule and growing batch (section 3.4.1)."""
  e = _study(presets.llama3("405b"), lr=8e-5, steps=1_200_000, batch=512)
  # 4M tokens, 8M after the first 252M, 16M after 2.87T. (The first had rows of 4,096.)
  e.batch_stages = ((60, 1024), (342_000, 2048))
  e.optimizer = AdamW(lr=8e-5, schedule=Cosine(warmup=8000, final=0.01))
  e.mesh = Mesh(fsdp=-1, tensor=8)
  return e


def qk_norm() -> Experiment:
  """Do normalised queries and keys let base train stably at twice its rate?"""
  model = presets.llama3("1b")
  block = model.pattern[0]
  block.attention = dataclasses.replace(block.attention, qk_norm=RMSNormConfig(eps=1e-5))
  return _study(model, lr=8e-4, steps=240_000, batch=512)


def windowed() -> Experiment:
  """What do windows of 1,024 in three layers of four cost base in loss, and save in time?"""
  model = presets.llama3("1b")
  local = copy.deepcopy(model.pattern[0])
  local.attention = dataclasses.replace(local.attention, window=1024)
  model.pattern = (local, local, local, *model.pattern)
  return _study(model, lr=4e-4, steps=240_000, batch=512)


def _study(model: LanguageModelConfig, lr: float, steps: int, batch: int) -> Experiment:
  """A model on rows of 8,192 tokens; rates are peaks, of table 3 where nothing else is said."""
  for block in model.pattern:
    # Frequency scaling came with the extension to 131,072 positions, after this training.
    block.attention.rotary = Rotary(theta=500_000.0)
  tokenizer = TokenizerFile(path=TOKENIZER, eot="<|end_of_text|>")
  return Experiment(
    model=model,
    data=TextData(source=Files(pattern=DATA), tokenizer=tokenizer, seq=ROW),
    # Betas, decay and clipping are AdamW's defaults, as Llama 2's (arXiv:2307.09288, section 2.2).
    optimizer=AdamW(lr=lr, schedule=Cosine(warmup=8000)),
    objective=CausalLM(),
    steps=steps,
    batch=batch,
    evaluation=Evaluation(every=5000, batch=512, prompts=("The capital of France is",)),
    checkpoints=Checkpoints(every=1000, keep_every=100_000),
  )
