"""A run as a notebook or another machine holds it: what it shows, and what it answers to slips."""

import random
import shutil

import numpy as np
import pytest

from bigtrain import Checkpoints, Evaluation, Experiment, Logging, Refused, cli
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE
from bigtrain.exit_codes import Exit
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Constant
from bigtrain.run import load_run
from bigtrain.train import train

VOCAB = 280


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  """A trained run, whose corpus and cache are gone."""
  folder = tmp_path_factory.mktemp("notebook")
  rng = random.Random(0)
  (folder / "text").mkdir()
  for i in range(40):
    words = [rng.choice(["sense", "and", "sensibility", "pride"]) for _ in range(40)]
    (folder / "text" / f"{i:02}.txt").write_text(" ".join(words))
  attention, feed_forward = AttentionConfig(heads=2), FeedForwardConfig(hidden=16)
  block = BlockConfig(attention=attention, feed_forward=feed_forward)
  experiment = Experiment(
    model=LanguageModelConfig(vocab=VOCAB, dim=16, layers=1, pattern=(block,)),
    data=TextData(
      source=Files(pattern=str(folder / "text"), validation=0.1), tokenizer=BPE(vocab=VOCAB), seq=32
    ),
    objective=CausalLM(loss_chunk=None),
    optimizer=AdamW(lr=1e-3, schedule=Constant(warmup=0)),
    steps=3,
    batch=8,
    evaluation=Evaluation(every=0, batch=8),
    checkpoints=Checkpoints(every=0),
    logging=Logging(every=1, tensorboard=False),
  )
  with pytest.MonkeyPatch.context() as environment:
    environment.setenv("BIGTRAIN_CACHE", str(folder / "cache"))
    train(experiment, folder / "run", quiet=True)
  shutil.rmtree(folder / "text")
  for name in ("data", "tokenizers"):
    shutil.rmtree(folder / "cache" / name)
  return folder / "run"


@pytest.fixture(scope="module")
def run(run_dir):
  with pytest.MonkeyPatch.context() as environment:
    environment.setenv("BIGTRAIN_CACHE", str(run_dir.parent / "other"))
    yield load_run(run_dir)


def test_a_run_shows_where_it_is_how_far_it_came_and_how_large_it_is(run, run_dir):
  # Table 280 x 16, attention 4 x 16 x 16, network 2 x 16 x 16, three norms.
  size = VOCAB * 16 + 4 * 256 + 2 * 256 + sum(n.size for n in norms(run.weights))
  loss = run.metrics["loss"][-1]
  assert repr(run) == f"<Run {run_dir}, step 3 of 3, {size:,} parameters, last loss {loss:.4f}>"
  assert repr(run.model).startswith("LanguageModel(")


def norms(model):
  import jax

  leaves = jax.tree_util.tree_leaves_with_path(model)
  return [leaf for path, leaf in leaves if "norm" in jax.tree_util.keystr(path)]


def test_a_name_that_was_not_recorded_is_answered_by_the_nearest_and_by_all(run):
  with pytest.raises(KeyError) as error:
    run.metrics["los"]
  assert str(error.value).startswith(
    "there is no 'los'; did you mean 'loss'? Recorded are accuracy"
  )
  with pytest.raises(Refused, match="did you mean 'eval/validation/loss'"):
    run.evaluations["validation/loss"]
  assert run.metrics.get("los") is None and "los" not in run.metrics


def test_a_run_is_sampled_where_its_corpus_is_not(run):
  assert run.tokenizer.decode(run.tokenizer.encode("pride and née")) == "pride and née"
  (text,) = run.sample("pride and", tokens=5, seed=1)
  assert text and text == run.sample("pride and", tokens=5, seed=1)[0]
  with pytest.raises(Refused, match="text"):
    run.data.tokenizer  # noqa: B018


def test_a_setting_of_sampling_that_does_not_exist_and_no_samples_are_refused(run, run_dir, capfd):
  with pytest.raises(Refused, match=r"sample has no setting 'top_q'; did you mean 'top_p'\?"):
    run.sample("pride", top_q=1)
  assert cli.main(["sample", str(run_dir), "--samples", "0"]) == Exit.REFUSED
  assert capfd.readouterr() == ("", "bigtrain: samples is 0; give 1 or more\n")


def test_the_command_prints_prompts_with_their_continuations_and_nothing_else(run_dir, run, capfd):
  flags = ["--tokens", "5", "--samples", "2"]
  assert cli.main(["sample", str(run_dir), "--prompt", "pride and", *flags]) == Exit.DONE
  texts = run.sample("pride and", tokens=5, samples=2)
  assert capfd.readouterr().out == "\n---\n".join(f"pride and{text}" for text in texts) + "\n"


def test_a_model_takes_lists_as_arrays(run):
  rows = [[1, 2, 3]] * 8
  np.testing.assert_array_equal(run.model(rows), run.model(np.array(rows, np.int32)))


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    ([1, 2, 3], r"rows of token ids, \(B, T\), not \(3,\); for one row: \[ids\]"),
    ("It was", r"token ids, not text: run.model\(\[run.tokenizer.encode\(text\)\]\)"),
    (["It was"], "token ids, not text"),
    ([[1, 2], [3]], "equally many tokens"),
    ([[1.0, 2.0]], "token ids are integers, not float64"),
    ([[1, VOCAB]], f"token ids are from 0 to {VOCAB - 1}, not 1 to {VOCAB}"),
    ([[1, 2]], "1 rows do not divide over the mesh: give a multiple of 8"),
  ],
)
def test_what_is_no_batch_of_token_ids_is_refused(run, tokens, message):
  with pytest.raises(Refused, match=message):
    run.model(tokens)
