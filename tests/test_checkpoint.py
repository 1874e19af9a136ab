"""Checkpoints: what they hold, onto what they restore, which are kept, and what is refused."""

import contextlib
import hashlib
import json
import math
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import bigtrain
from bigtrain import Checkpoints, Mesh, saved
from bigtrain.checkpoint import SaveFailed, Store
from bigtrain.config import Refused
from bigtrain.leaves import flatten
from bigtrain.parts import Part
from bigtrain.program import Program
from bigtrain.run import load_run
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train
from tests import runs, toys

GOLDEN = Path(__file__).parent / "golden" / "checkpoint"


pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Ten steps on every mesh axis: the run."""
  experiment = runs.base()
  experiment.steps, experiment.mesh = 10, Mesh(data=2, fsdp=2, tensor=2)
  return train(experiment, tmp_path_factory.mktemp("trained") / "run", quiet=True)


def numpy_leaves(tree) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def store(path, **keep) -> Store:
  return Store(RunDirectory(path).checkpoints, Checkpoints(**keep))


def save(path, *steps: int, tree=None, **keep) -> list[int]:
  with store(path, **keep) as opened:
    for step in steps:
      opened.save(step, tree or {"x": np.arange(3.0) + step}, toys.experiment())
  return runs.saved(path)


@pytest.mark.parametrize("axes", [None, {"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}])
def test_a_checkpoint_restores_bit_for_bit_onto_any_mesh(trained, axes):
  mesh = axes and Mesh(**axes).make()
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    abstract = Program(trained.experiment, mesh).abstract()
    state = saved.newest(trained.directory.checkpoints, abstract)
  expected, restored = flatten(trained.state), flatten(state)
  assert expected.keys() == restored.keys()
  for name, leaf in restored.items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[name]), name)
    assert leaf.dtype == expected[name].dtype
    assert leaf.sharding.device_set == set(jax.devices() if mesh else jax.devices()[:1]), name
  assert int(state.step) == 10 and int(state.example) == 80


def test_a_run_of_eight_devices_loads_on_one(trained, monkeypatch):
  logits = np.asarray(trained.model(np.arange(16).reshape(8, 2)))
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  run = load_run(trained.directory.path)
  assert run.mesh is None
  np.testing.assert_allclose(run.model(np.arange(16).reshape(8, 2)), logits, atol=1e-5)


def test_a_run_whose_mesh_does_not_fit_loads_on_what_is_there(trained, tmp_path):
  shutil.copytree(trained.directory.path, tmp_path / "run")
  config = json.loads((tmp_path / "run/config.json").read_text())
  config["mesh"] |= {"data": 4, "fsdp": 2, "tensor": 2}
  (tmp_path / "run/config.json").write_text(json.dumps(config))
  run = load_run(tmp_path / "run")
  assert {axis: n for axis, n in run.mesh.shape.items() if n > 1} == {"fsdp": 8}
  tokens = np.arange(16).reshape(8, 2)
  np.testing.assert_allclose(run.model(tokens), trained.model(tokens), atol=1e-5)


def test_a_run_whose_text_is_elsewhere_still_loads_on_its_mesh(trained, tmp_path):
  shutil.copytree(trained.directory.path, tmp_path / "run")
  config = json.loads((tmp_path / "run/config.json").read_text())
  config["data"]["source"]["pattern"] = str(tmp_path / "elsewhere")
  (tmp_path / "run/config.json").write_text(json.dumps(config))
  assert load_run(tmp_path / "run").mesh.shape == trained.mesh.shape


def test_a_run_from_python_has_its_metrics_and_its_model(trained):
  assert trained.metrics["step"].tolist() == list(range(1, 11))
  loss = trained.metrics["loss"]
  assert loss.shape == (10,) and math.log(384) + 0.5 > loss[0] > loss[-1] > 1
  loaded = load_run(trained.directory.path)
  assert loaded.metrics["loss"].tolist() == loss.tolist()
  logits = loaded.model(np.zeros((8, 4), np.int32))
  assert logits.shape == (8, 4, 384)
  np.testing.assert_array_equal(logits, trained.model(np.zeros((8, 4), np.int32)))
  assert bigtrain.load_run(trained.directory.path, 5).state.step == 5


@pytest.mark.parametrize("step", [6, None])
def test_a_checkpoint_that_is_not_there_is_refused(trained, tmp_path, step):
  path = trained.directory.path if step else tmp_path
  if not step:
    shutil.copy(trained.directory.path / "config.json", tmp_path)
  with pytest.raises(Refused, match="has no checkpoint of step 6" if step else "no checkpoint"):
    load_run(path, step)


def test_weights_start_another_run_with_a_fresh_optimizer(trained, tmp_path):
  experiment = runs.base()
  experiment.steps, experiment.weights_from = 10, str(trained.directory.path)
  seen = {}

  class Look(Part):
    def start(self, run, step):
      seen.update(numpy_leaves(run.state))

  train(experiment, tmp_path / "run", quiet=True, parts=[Look()])
  expected = numpy_leaves(trained.state)
  for name, leaf in seen.items():
    if name.startswith("model."):  # The weights themselves, not their average.
      np.testing.assert_array_equal(leaf, expected[name])
    elif ".mu." in name or ".nu." in name or name in ("step", "example"):
      assert not leaf.any(), name
  assert any(".mu." in name for name in seen)


def test_weights_of_no_run_are_refused_and_leave_nothing_in_the_way(trained, tmp_path):
  experiment = runs.base()
  experiment.weights_from = str(tmp_path / "nothing")
  with pytest.raises(Refused, match=r"weights_from: there is no directory .*nothing$"):
    train(experiment, tmp_path / "run", quiet=True)
  assert not runs.events(tmp_path / "run", "data")  # Nothing was prepared.
  experiment.weights_from = str(trained.directory.path)
  experiment.steps = 5
  assert train(experiment, tmp_path / "run", quiet=True).state.step == 5


def test_a_leaf_that_is_missing_or_of_another_shape_is_refused_by_name(tmp_path):
  save(tmp_path, 3, tree={"model": {"up_DF": np.zeros((4, 8), np.float32)}})
  path = RunDirectory(tmp_path).checkpoints
  want = lambda name, shape, dtype: {"model": {name: jax.ShapeDtypeStruct(shape, dtype)}}
  with pytest.raises(Refused, match=r"checkpoint .*/3 has no model.upp_DF; did you mean 'model"):
    saved.newest(path, want("upp_DF", (4, 8), np.float32))
  with pytest.raises(
    Refused, match=r"\[4,8\], not float32\[4,9\]; .* undo that change, or .*another run directory"
  ):
    saved.newest(path, want("up_DF", (4, 9), np.float32))
  with pytest.raises(Refused, match=r"model.up_DF as float32\[4,8\], not int32\[4,8\]"):
    saved.newest(path, want("up_DF", (4, 8), np.int32))


@pytest.mark.parametrize("damaged", ["_METADATA", "manifest.ocdbt", "d/*"])
@pytest.mark.parametrize(
  ("steps", "remedy"),
  [((2, 5), "remove that directory to go on from that of step 2"), ((5,), "there is no earlier")],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damaged, steps, remedy):
  tree = {"x": np.random.default_rng(0).normal(size=3000)}
  save(tmp_path, *steps, tree=tree)
  path = RunDirectory(tmp_path).checkpoints
  for file in (path / "5").glob(damaged):
    file.write_bytes(file.read_bytes()[:20])
  with pytest.raises(Refused, match=rf"checkpoint {path}/5 cannot be read: .*{remedy}") as refused:
    saved.newest(path, {"x": jax.ShapeDtypeStruct((3000,), np.float64)})
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 800
  if len(steps) == 2:
    shutil.rmtree(path / "5")
    like = {"x": jax.ShapeDtypeStruct((3000,), np.float64)}
    with jax.enable_x64(True):
      np.testing.assert_array_equal(saved.newest(path, like)["x"], tree["x"])


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as newer:
    newer.setattr(saved, "FORMAT", saved.FORMAT + 1)
    save(tmp_path, 1)
  with pytest.raises(Refused, match=r"has format 3, and this version of bigtrain reads up to 2"):
    saved.newest(RunDirectory(tmp_path).checkpoints, {"x": jax.ShapeDtypeStruct((3,), np.float64)})


def test_the_newest_are_kept_and_every_mth_for_ever(tmp_path):
  assert save(tmp_path / "a", *range(1, 8), keep=2) == [6, 7]
  assert save(tmp_path / "b", *range(1, 8), keep=1, keep_every=3) == [3, 6, 7]
  assert save(tmp_path / "b", 8, 10, keep=1, keep_every=3) == [3, 6, 10]


@pytest.mark.parametrize(("every", "kept"), [(0, [7]), (3, [3, 6, 7]), (7, [7]), (9, [7])])
def test_the_last_step_is_always_saved(tmp_path, every, kept):
  experiment = runs.base()
  experiment.steps, experiment.checkpoints = 7, Checkpoints(every=every, keep=9)
  train(experiment, tmp_path, quiet=True)
  assert runs.saved(tmp_path) == kept


def test_what_killed_saves_left_is_removed(tmp_path):
  save(tmp_path, 1)
  left = tmp_path / "checkpoints/2.orbax-checkpoint-tmp/default"
  left.mkdir(parents=True)
  (left / "data").write_bytes(b"half")
  assert save(tmp_path, 3) == [1, 3]


def test_a_full_disk_stops_the_run_and_leaves_what_was_saved(tmp_path):
  experiment = runs.base()
  whole = train(experiment, tmp_path / "whole", quiet=True)
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)

  class Fill(Part):
    def before_step(self, step):
      if step == 8:
        self.run.store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))

  try:
    with pytest.raises(SaveFailed) as failed:
      train(experiment, tmp_path / "run", quiet=True, parts=[Fill()])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert "File too large" in str(failed.value) and "that of step 5 is whole" in str(failed.value)
  assert runs.lines(tmp_path / "run/metrics.jsonl") < 20  # It did not go on to the end.
  again = train(experiment, tmp_path / "run", quiet=True)
  assert runs.values(again.directory.path) == runs.values(whole.directory.path)
  assert runs.saved(tmp_path / "run") == [15, 20]


def test_the_golden_checkpoint_restores():
  """The first format, as tools/golden/make_checkpoint.py wrote it; every later one reads it."""
  known = json.loads((GOLDEN / "known.json").read_text())
  run = load_run(GOLDEN)
  digests = {
    name: hashlib.sha256(leaf.tobytes()).hexdigest()
    for name, leaf in numpy_leaves(run.state).items()
  }
  assert digests.items() >= known["digests"].items()
  begun = {
    name: leaf for name, leaf in numpy_leaves(run.state).items() if name not in known["digests"]
  }
  assert all(name.startswith("statistics.") for name in begun) and not any(begun.values())
  tokens = np.array(known["tokens"])
  np.testing.assert_allclose(np.asarray(run.model(tokens))[0], known["logits"], atol=1e-4)
