"""Models, data and objectives that do not go together, refused before anything is prepared."""

import dataclasses
from pathlib import Path

import pytest

from bigtrain import load
from bigtrain.config import Refused, config
from bigtrain.interop.nnx_module import WithNNXModule
from bigtrain.objectives import CausalLM, MaskedLM, SpanCorruption
from bigtrain.objectives.classification import Classification
from bigtrain.smoke import shrink
from bigtrain.train import train
from tests.interop import test_nnx_module as flax

FOLDER = Path(__file__).parent.parent / "experiments"


def experiment(name: str):
  return shrink(load.load(str(FOLDER / name))[0])


@pytest.mark.parametrize(
  ("study", "objective", "said"),
  [
    (
      "quickstart.py",
      Classification(),
      "Classification does not go with LanguageModelConfig and TextData: it reads `labels`, and "
      "the batches have positions, segments, targets, tokens, weights; Classification takes a "
      "model with classes (MLPConfig",
    ),
    (
      "mlp.py",
      CausalLM(),
      "CausalLM does not go with MLPConfig and FeatureData: it asks for `hidden`, which MLP does "
      "not have; CausalLM takes a decoder, such as presets.gpt2(...), and TextData",
    ),
    ("quickstart.py", MaskedLM(), "MaskedLM takes a MaskedLMConfig and MaskedText"),
    ("bert.py:small", CausalLM(), "`hidden`, which MaskedLanguageModel does not have; CausalLM"),
    ("quickstart.py", SpanCorruption(), "it reads `target_positions`, and the batches have pos"),
    ("mlp.py", WithNNXModule(), "WithNNXModule takes a config of your own that is an NNXModule"),
  ],
)
def test_an_objective_that_wants_something_else_is_refused_before_any_work(
  study, objective, said, tmp_path, monkeypatch
):
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  with pytest.raises(Refused) as refusal:
    train(dataclasses.replace(experiment(study), objective=objective), tmp_path / "run")
  assert said in str(refusal.value) and "\n" not in str(refusal.value)
  assert not [*tmp_path.iterdir()]


def test_an_encoder_decoder_is_no_decoder(tmp_path):
  e = dataclasses.replace(experiment("quickstart.py"), model=experiment("t5.py:tiny").model)
  e.model.vocab = e.data.vocabulary()
  with pytest.raises(Refused, match=r"EncoderDecoder.*CausalLM takes a decoder"):
    train(e, tmp_path / "run")


def test_a_module_of_ones_own_needs_its_adapter(tmp_path):
  with pytest.raises(Refused) as refusal:
    train(flax.experiment(objective=Classification()), tmp_path / "run")
  assert str(refusal.value) == (
    "CNNConfig is an NNXModule, which another objective trains by way of WithNNXModule: write "
    "objective=WithNNXModule(objective=Classification(...))"
  )


def test_what_fails_in_someones_own_code_is_raised_as_it_is(tmp_path):
  e = dataclasses.replace(experiment("quickstart.py"), objective=Own())
  with pytest.raises(KeyError, match="of my own"):
    train(e, tmp_path / "run")


@config
class Own(CausalLM):
  def __call__(self, model, batch, key):
    return {}["of my own"]
