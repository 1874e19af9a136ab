"""GPT-2 from scratch, at its four sizes.

Edit DATA and TOKENIZER: any text, such as OpenWebText, and the tokenizer.json of GPT-2.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import TokenizerFile
from bigtrain.models import presets
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine, WarmupStableDecay

DATA = "data/openwebtext/**/*.parquet"
TOKENIZER = "data/gpt2/tokenizer.json"

ROW = 1024  # Tokens; with 512 rows as in Radford et al. 2019, section 2.3.
WARMUP = 2000  # Steps, and 600,000 in all: github.com/karpathy/nanoGPT, config/train_gpt2.py.


def base() -> Experiment:
  """The smallest, gpt2_124m."""
  return gpt2_124m()


def gpt2_124m() -> Experiment:
  """124M parameters; a loss of 2.85 on OpenWebText is what nanoGPT reports."""
  return _study(presets.gpt2("124m"), lr=6e-4)


def gpt2_355m() -> Experiment:
  """355M parameters."""
  return _study(presets.gpt2("355m"), lr=3e-4)


def gpt2_774m() -> Experiment:
  """774M parameters."""
  return _study(presets.gpt2("774m"), lr=2.5e-4)


def gpt2_1_5b() -> Experiment:
  """1.5B parameters."""
  return _study(presets.gpt2("1.5b"), lr=2e-4)


def rotary() -> Experiment:
  """Do rotary positions reach base's final loss in fewer steps than learned ones?"""
  model = presets.gpt2("124m")
  model.position = None
  model.pattern[0].attention.rotary = Rotary()
  return _study(model, lr=6e-4)


def stable() -> Experiment:
  """Does a constant rate with a short fall end where base's cosine ends?

  If so, one long run gives a finished model of any length for the price of its fall.
  """
  e = base()
  e.optimizer = AdamW(lr=6e-4, schedule=WarmupStableDecay(warmup=WARMUP))
  return e


def _study(model: LanguageModelConfig, lr: float) -> Experiment:
  """A model, at the peak rate of the GPT-3 nearest in size (arXiv:2005.14165, table 2.1)."""
  model.vocab = 50304  # 50,257, padded to a multiple of 128, which a tensor axis divides.
  return Experiment(
    model=model,
    data=TextData(source=Files(pattern=DATA), tokenizer=TokenizerFile(path=TOKENIZER), seq=ROW),
    # Betas, decay and clipping are AdamW's defaults: GPT-3's, appendix B.
    optimizer=AdamW(lr=lr, schedule=Cosine(warmup=WARMUP)),
    objective=CausalLM(),
    steps=600_000,
    batch=512,
    evaluation=Evaluation(every=2000, batch=512, prompts=("In a shocking finding,",)),
    checkpoints=Checkpoints(every=1000, keep_every=50_000),
  )
