"""First weights from another run or a file, for a part of a model, and what is told of the rest."""

import dataclasses
import shutil

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from bigtrain import weights
from bigtrain.config import Refused
from bigtrain.leaves import flatten
from bigtrain.mesh import Mesh
from bigtrain.models.encoder import TextClassifierConfig
from bigtrain.program import Program
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train
from bigtrain.validate import validate
from tests import golden, packed
from tests.models import test_encoder
from tests.models.build import filled
from tests.objectives.test_masked_lm import experiment
from tests.test_checkpoint import save

CLASSES = 3


def state_of(config, module=None, mesh=None):
  """The state of a run that has not begun, with that module's weights."""
  e = dataclasses.replace(experiment(), model=config)
  state = jax.eval_shape(Program(e, mesh).init, jax.random.key(0))
  return dataclasses.replace(state, model=module or filled(config.make, seed=3))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """The directory of a masked-token run with a next-sentence head, and its weights."""
  folder = tmp_path_factory.mktemp("weights")
  module = filled(experiment().model.make)
  variables = jax.tree.map(lambda _: None, module)
  save(folder, 3, tree={"model": module, "variables": variables})
  return str(folder), module


def classifier():
  return TextClassifierConfig(encoder=experiment().model.encoder, classes=CLASSES)


def test_a_classifier_begins_with_the_encoder_of_a_run_and_its_own_head(pretrained):
  path, module = pretrained
  fresh = state_of(classifier())
  found, told = weights.load(path, fresh, ("classes",))
  for name, leaf in flatten(found["model"].encoder).items():
    np.testing.assert_array_equal(leaf, flatten(module.encoder)[name])
  np.testing.assert_array_equal(found["model"].classes_MC[...], fresh.model.classes_MC[...])
  assert told[0].endswith("classes_MC, classes_bias_C begin fresh") or told[0].endswith(
    "classes_bias_C, classes_MC begin fresh"
  )
  assert "next_MC" in told[1] and told[1].endswith("and 3 more of it left out")


def test_what_is_neither_there_nor_named_new_is_refused_and_so_is_a_name_of_nothing(pretrained):
  path, _ = pretrained
  fresh = state_of(classifier())
  with pytest.raises(Refused, match=r"has no model\.classes_.*or new_weights for what shall begin"):
    weights.load(path, fresh, ())
  with pytest.raises(Refused, match=r"the model has no clases; did you mean 'classes_"):
    weights.load(path, fresh, ("classes", "clases"))
  other = classifier()
  other.encoder.vocab += 8
  with pytest.raises(Refused, match=r"has model\.encoder\.embed_VD as float32\[80,32\], not"):
    weights.load(path, state_of(other), ("classes",))


def test_a_whole_model_is_taken_without_a_word(pretrained):
  path, module = pretrained
  found, told = weights.load(path, state_of(experiment().model), ())
  assert told == []
  chex.assert_trees_all_equal(found["model"], module)


@pytest.mark.parametrize("mesh", [None, Mesh(data=2, fsdp=2, tensor=2)])
def test_a_file_of_hugging_face_fills_an_encoder_on_any_mesh(mesh, tmp_path):
  arrays = golden.read("bert")
  tensors = {k: v for k, v in arrays.items() if k not in test_encoder.ROWS}
  save_file(tensors, tmp_path / "model.safetensors")
  encoder = test_encoder.config().encoder
  encoder.pattern[0].attention.heads, encoder.pattern[0].attention.head_dim = 4, 6
  c = TextClassifierConfig(encoder=encoder, classes=CLASSES)
  made = mesh and mesh.make()
  with packed.in_mesh(made):
    fresh = state_of(c)
    if made:
      place = jax.eval_shape(lambda: c.make(jax.random.key(0)))
      put = lambda x, like: jax.device_put(x, jax.NamedSharding(made, like.sharding.spec))
      fresh = dataclasses.replace(fresh, model=jax.tree.map(put, fresh.model, place))
    source = str(tmp_path / "model.safetensors")
    found, told = weights.load(source, fresh, ("classes",))
  same = jax.tree.map(lambda a, b: a.sharding == b.sharding, found["model"], fresh.model)
  assert all(jax.tree.leaves(same))
  np.testing.assert_array_equal(
    found["model"].encoder.embed_VD[...], tensors["bert.embeddings.word_embeddings.weight"]
  )
  assert "begin fresh" in told[0] and "cls." in told[1]


def test_a_run_begins_with_them_and_writes_down_what_is_new(pretrained, tmp_path):
  path, module = pretrained
  e = experiment(pairs=False, weights_from=path, mesh=Mesh(data=8, fsdp=1))
  e.optimizer.lr, e.steps = 1e-12, 1
  e.new_weights = ("transform",)
  run = train(e, tmp_path / "run", quiet=True)
  got, wanted = (m.encoder.embed_VD[...] for m in (run.state.model, module))
  np.testing.assert_allclose(got, wanted, atol=1e-6)
  assert np.abs(run.state.model.transform_DM[...] - module.transform_DM[...]).max() > 0.1
  np.testing.assert_allclose(run.state.model.transform_norm.scale_D[...], 1, atol=1e-6)
  events = (tmp_path / "run" / "events.jsonl").read_text()
  assert "transform_DM" in events and "begin fresh" in events and "left out" in events


def test_another_tokenizer_than_the_run_had_is_told(pretrained):
  path, _ = pretrained
  kept = RunDirectory(path).tokenizer
  kept.write_text('{"model": {"vocab": {"a": 0}}}')
  load = lambda text: weights.load(path, state_of(experiment().model), (), text)[1]
  try:
    assert load('{"model": {"vocab": {"a":  0}}}') == load(None) == []
    assert "another tokenizer" in load('{"model": {"vocab": {"b": 0}}}')[0]
  finally:
    kept.unlink()


def test_new_weights_without_a_source_are_refused():
  with pytest.raises(Refused, match="come from weights_from"):
    validate(experiment(new_weights=("classes",)))


def test_a_wrong_path_is_answered_by_what_has_weights(pretrained, tmp_path):
  """Not by a run that has only begun, such as the one that asks."""
  for name in ("first", "fist"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").touch()
  shutil.copytree(f"{pretrained[0]}/checkpoints", tmp_path / "first" / "checkpoints")
  with pytest.raises(Refused, match=rf"did you mean '{tmp_path}/first'\?$"):
    weights.check_source(str(tmp_path / "frist"))
  (tmp_path / "model.safetensors").touch()
  with pytest.raises(Refused, match=rf"did you mean '{tmp_path}/model.safetensors'\?$"):
    weights.check_source(str(tmp_path / "modle.safetensors"))
