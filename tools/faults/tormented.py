"""The run that is tormented (torment.py): a small transformer, so that a step takes a moment.

$RUNS_TEXT names the folder of its text, as in tests/runs.py.
"""

from bigtrain import Checkpoints, Evaluation, Experiment, Logging
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from tests import runs


def base() -> Experiment:
  """With dropout and averaged weights, so that keys and the average decide the future too."""
  e = runs.base()
  block = BlockConfig(
    attention=AttentionConfig(heads=4, rotary=Rotary()),
    feed_forward=FeedForwardConfig(hidden=256),
  )
  e.model = LanguageModelConfig(vocab=384, dim=64, layers=2, pattern=(block,), dropout=0.1)
  e.batch, e.optimizer.lr = 16, 1e-3
  e.evaluation = Evaluation(every=500, batch=16)
  e.checkpoints = Checkpoints(every=100)
  e.logging = Logging(every=10, layers_every=500, tensorboard=False)
  return e
