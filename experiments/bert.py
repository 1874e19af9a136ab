"""BERT from scratch (arXiv:1810.04805): masked tokens, with or without pairs of texts.

`small` trains on two CPU cores, on the embedded corpus, at one to two steps a second. For the
others edit DATA and TOKENIZER: any text, such as Wikipedia, and the tokenizer.json of
bert-base-uncased.
"""

from bigtrain import Checkpoints, Evaluation, Experiment
from bigtrain.data.labelled_text import LabelledText
from bigtrain.data.masked import SPECIAL, MaskedText
from bigtrain.data.sources import Files
from bigtrain.data.text_classes import Novels
from bigtrain.data.tokenizers import BPE, TokenizerFile
from bigtrain.models import presets
from bigtrain.models.encoder import MaskedLMConfig, TextClassifierConfig
from bigtrain.models.initial import Normal
from bigtrain.models.position import Learned
from bigtrain.objectives import MaskedLM
from bigtrain.objectives.classification import Classification
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Linear

DATA = "data/wikipedia/**/*.parquet"
TOKENIZER = "data/bert/tokenizer.json"
SMALL = "runs/bert-small"  # Where `bigtrain train experiments/bert.py:small` leaves its run.


def base() -> Experiment:
  """BERT base on masked tokens alone, in rows of 512 tokens."""
  return _study("base", lr=1e-4)


def large() -> Experiment:
  """BERT large, the same."""
  return _study("large", lr=1e-4)


def next_sentence() -> Experiment:
  """Does the next-sentence task of the paper help base, or hurt (RoBERTa, arXiv:1907.11692)?"""
  return _with_pairs(base())


def whole_words() -> Experiment:
  """Are whole words, harder to guess, better to learn from?"""
  e = base()
  e.data.whole_words = True
  return e


def small() -> Experiment:
  """Four layers of 128 on the novels of Jane Austen.

  Norms come first and weights begin larger than in the paper's: so narrow a model else sees little
  of its context for long.
  """
  model = presets.bert("base")
  model.vocab, model.dim, model.layers, model.position = 2048, 128, 4, Learned(length=128)
  model.pattern[0].attention.heads, model.pattern[0].feed_forward.hidden = 4, 512
  model.pattern[0].attention.dropout = model.dropout = 0.0  # It sees the corpus a few times only.
  model.norm_placement, model.init = "pre", Normal(std=0.09, residual="same")
  model.remat, model.unroll = "none", 4
  return Experiment(
    model=MaskedLMConfig(encoder=model),
    data=MaskedText(tokenizer=BPE(vocab=2048, special=SPECIAL), seq=128),
    objective=MaskedLM(),
    optimizer=AdamW(lr=3e-3, schedule=Linear(warmup=100)),
    steps=2000,
    batch=32,
    evaluation=Evaluation(every=500),
    checkpoints=Checkpoints(every=500),
  )


def small_next_sentence() -> Experiment:
  """The same with pairs of texts."""
  return _with_pairs(small())


def novels() -> Experiment:
  """Which of six novels is a passage from? The small encoder, its first weights random."""
  e = small()
  return Experiment(
    model=TextClassifierConfig(encoder=e.model.encoder, classes=6),
    data=LabelledText(source=Novels(), tokenizer=BPE(vocab=2048, special=SPECIAL), seq=128),
    objective=Classification(),
    optimizer=AdamW(lr=1e-3, schedule=Linear(warmup=50)),
    epochs=3,
    batch=32,
    evaluation=Evaluation(every=200),
    checkpoints=Checkpoints(every=200),
  )


def novels_tuned() -> Experiment:
  """The same from the weights of `small`, of which a run must be there: how much do they help?"""
  e = novels()
  e.weights_from, e.new_weights = SMALL, ("classes", "encoder.pooler")
  e.data.tokenizer = TokenizerFile(path=f"{SMALL}/tokenizer.json")
  return e


def _with_pairs(e: Experiment) -> Experiment:
  e.data.next_sentence = e.model.next_sentence = True
  return e


def _study(size: str, lr: float) -> Experiment[MaskedLMConfig, MaskedText, AdamW, MaskedLM]:
  """A preset with the paper's optimizer (appendix A.2)."""
  tokenizer = TokenizerFile(path=TOKENIZER, eot="[SEP]")
  return Experiment(
    model=MaskedLMConfig(encoder=presets.bert(size)),
    data=MaskedText(source=Files(pattern=DATA), tokenizer=tokenizer, seq=512),
    optimizer=AdamW(
      lr=lr, b2=0.999, eps=1e-6, weight_decay=0.01, schedule=Linear(warmup=10_000, final=0.0)
    ),
    objective=MaskedLM(),
    steps=1_000_000,
    batch=256,
    evaluation=Evaluation(every=10_000, batch=256),
    checkpoints=Checkpoints(every=5000, keep_every=100_000),
  )
