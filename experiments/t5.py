"""T5 from scratch (arXiv:1910.10683, version 1.1): an encoder-decoder fills the gaps of a text.

`tiny` trains on two CPU cores, on the embedded corpus. For the others edit DATA and TOKENIZER: any
text, such as C4, and the tokenizer.json of google/t5-v1_1-base.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.sources import Files
from bigtrain.data.spans import Spans
from bigtrain.data.tokenizers import BPE, TokenizerFile
from bigtrain.models import presets
from bigtrain.models.encoder_decoder import EncoderDecoderConfig
from bigtrain.objectives import SpanCorruption
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.schedule import InverseSqrt, Linear

DATA = "data/c4/**/*.jsonl.gz"
TOKENIZER = "data/t5/tokenizer.json"


def base() -> Experiment:
  """T5 1.1 base, as long as in the paper: 2**35 tokens of text."""
  return _study("base")


def small() -> Experiment:
  """T5 1.1 small, the same."""
  return _study("small")


def longer_spans() -> Experiment:
  """Are spans of 5 tokens or of 10 worse than 3 (table 7 of the paper), and cheaper to predict?"""
  e = base()
  e.data.span = 5.0
  return e


def tiny() -> Experiment:
  """Three layers of 128 on each side, on the novels of Jane Austen."""
  model = presets.t5("small")
  model.vocab, model.dim, model.layers = 2176, 128, 3
  block = model.pattern[0]
  block.attention.heads, block.attention.head_dim, block.feed_forward.hidden = 4, 32, 256
  model.remat, model.unroll = "none", 3
  return Experiment(
    model=model,
    data=Spans(tokenizer=BPE(vocab=2048), seq=128),
    objective=SpanCorruption(),
    optimizer=Adafactor(lr=3e-2, schedule=Linear(warmup=100)),
    steps=2000,
    batch=32,
    evaluation=Evaluation(
      every=500,
      prompts=("It is a truth<extra_id_0>, that a single<extra_id_1> must be in want.",),
      sample_tokens=20,
      temperature=0.0,
    ),
    checkpoints=Checkpoints(every=500),
  )


def _study(size: str) -> Experiment[EncoderDecoderConfig, Spans, Adafactor, SpanCorruption]:
  """A preset with the paper's optimizer (section 3.1.2)."""
  tokenizer = TokenizerFile(path=TOKENIZER, eot="</s>")
  return Experiment(
    model=presets.t5(size),
    data=Spans(source=Files(pattern=DATA), tokenizer=tokenizer, seq=512),
    objective=SpanCorruption(z_loss=1e-4),
    optimizer=Adafactor(lr=1e-2, schedule=InverseSqrt(warmup=10_000)),
    steps=2**19,
    batch=128,
    evaluation=Evaluation(every=10_000, batch=128),
    checkpoints=Checkpoints(every=5000, keep_every=100_000),
  )
