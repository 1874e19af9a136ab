"""Makes tests/golden/checkpoint: a run directory of the first checkpoint format.

    JAX_PLATFORMS=cpu python tools/golden/make_checkpoint.py

Three steps of a tiny model. known.json holds a digest of every leaf of the state as it was in
memory, and logits. It is not to be made again: that the old one restores is what it proves.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from bigtrain import Checkpoints, Evaluation, Experiment, Logging, train
from bigtrain.data.text import TextData
from bigtrain.leaves import flatten
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "checkpoint"
TOKENS = np.arange(16, dtype=np.int32).reshape(8, 2)


def experiment() -> Experiment:
  block = BlockConfig(
    attention=AttentionConfig(heads=2, rotary=Rotary()),
    feed_forward=FeedForwardConfig(hidden=16),
  )
  return Experiment(
    model=LanguageModelConfig(vocab=384, dim=8, layers=2, pattern=(block,), dtype="float32"),
    data=TextData(seq=32),
    objective=CausalLM(),
    optimizer=AdamW(lr=1e-2, weight_decay=0.1, average=0.9),
    steps=3,
    batch=8,
    evaluation=Evaluation(every=0, batch=8, sample_tokens=8),
    checkpoints=Checkpoints(every=0),
    logging=Logging(every=1, tensorboard=False),
  )


def main() -> None:
  if GOLDEN.exists():
    sys.exit(f"{GOLDEN} is there; it is made once for each format")
  with tempfile.TemporaryDirectory() as folder:
    run = train(experiment(), folder, quiet=True)
    shutil.copytree(Path(folder) / "checkpoints", GOLDEN / "checkpoints")
    shutil.copy(Path(folder) / "config.json", GOLDEN)
  for marker in GOLDEN.rglob("commit_success.txt"):  # It names the folder it was written in.
    marker.unlink()
  leaves = {name: np.asarray(leaf) for name, leaf in flatten(run.state).items()}
  known = {
    "digests": {name: hashlib.sha256(leaf.tobytes()).hexdigest() for name, leaf in leaves.items()},
    "tokens": TOKENS.tolist(),
    "logits": np.asarray(run.model(TOKENS))[0].round(6).tolist(),  # Of the first row.
  }
  (GOLDEN / "known.json").write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
  main()
