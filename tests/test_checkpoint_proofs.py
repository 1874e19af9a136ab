"""Checkpoints that prove themselves: read back, verified when restored, replayed, never lost."""

import itertools
import json
import math
import shutil
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

from bigtrain import Checkpoints, Mesh, checkpoint, digest, replay, written
from bigtrain.checkpoint import NothingWhole, SaveFailed, Store
from bigtrain.cli import main
from bigtrain.exit_codes import Exit
from bigtrain.failures import CheckFailed
from bigtrain.parts import Part
from bigtrain.run_directory import RunDirectory
from bigtrain.saved import Damaged
from bigtrain.train import train
from tests import runs, toys

TREE = {"w": np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32), "n": np.int32(7)}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)

pytestmark = pytest.mark.usefixtures("prepared")


def store(path, **keep) -> Store:
  return Store(RunDirectory(path).checkpoints, Checkpoints(**keep))


def write_wrongly(monkeypatch) -> None:
  """From now on what is written differs from what was to be, in one row of `w`."""
  of_arrays, where = digest.of_arrays, np.float32(1e-6)

  def of_others(arrays):
    if "w" in arrays:
      arrays = arrays | {"w": np.array(arrays["w"]) + where * (np.arange(40) == 5)[:, None]}
    return of_arrays(arrays)

  monkeypatch.setattr(digest, "of_arrays", of_others)


def test_a_save_is_read_back_and_marked(tmp_path):
  with store(tmp_path) as opened:
    opened.save(3, TREE, toys.experiment())
    opened.wait()
    (event,) = opened.news()
    assert (event["name"], event["step"], event["arrays"]) == ("verified", 3, 2)
    assert opened.committed() == [3]


def test_a_save_that_reads_back_as_something_else_fails_and_the_one_before_stays(
  tmp_path, monkeypatch
):
  with store(tmp_path, keep=1) as opened:
    opened.save(2, TREE, toys.experiment())
  write_wrongly(monkeypatch)
  with (
    pytest.raises(SaveFailed, match=r"w read back .* not what was saved; that of step 2 is whole"),
    store(tmp_path, keep=1) as opened,
  ):
    opened.save(5, TREE, toys.experiment())


def test_what_is_restored_is_compared_with_what_was_saved(tmp_path, monkeypatch):
  write_wrongly(monkeypatch)
  with store(tmp_path, verify=0.0) as opened:
    opened.save(3, TREE, toys.experiment())
    opened.wait()
    monkeypatch.undo()
    with pytest.raises(Damaged, match=r"checkpoint .*/3 cannot be read: w are not what was saved"):
      opened.restore(3, LIKE)
    assert opened.restore(3, {"n": LIKE["n"]})["n"] == 7


def test_a_share_is_read_back_and_other_saves_read_others(tmp_path):
  tree = {f"a{i}": np.full(3, i, np.float32) for i in range(30)}
  with store(tmp_path, verify=0.5, keep=9) as opened:
    for step in range(1, 5):
      opened.save(step, tree, toys.experiment())
    opened.wait()
    counts = [event["arrays"] for event in opened.news()]
  assert all(5 < n < 25 for n in counts) and len(set(counts)) > 1, counts


def test_hosts_read_the_same_share_wherever_they_have_mounted_it(tmp_path, monkeypatch):
  digests = {f"a{i}": [0] for i in range(30)}
  place, there = tmp_path / "here/7", tmp_path / "there"
  place.mkdir(parents=True)
  there.symlink_to(place.parent)
  read = []
  monkeypatch.setattr(written, "read_back", lambda _, names, *__: read.append(names) or digests)
  for path in (place, there / "7"):
    written.commit(epath.Path(path), digests, 0.5, 1.0)
  assert read[0] == read[1] and 5 < len(read[0]) < 25


def test_processes_read_disjoint_blocks_that_add_up(tmp_path):
  mesh = Mesh(data=2, fsdp=4).make()
  placed = jax.device_put(TREE["w"], jax.NamedSharding(mesh, jax.P("fsdp", "data")))
  with store(tmp_path) as opened:
    opened.save(1, {"w": placed}, toys.experiment())
  place = opened.path / "1"
  parts = [written.read_back(place, ["w"], p, 3)["w"] for p in range(3)]
  assert all(any(part) for part in parts)
  assert (np.sum(parts, axis=0) % 2**32).tolist() == digest.of_arrays({"w": TREE["w"]})["w"]


def test_a_save_that_takes_too_long_fails_at_the_next_step(tmp_path, monkeypatch):
  go_on = threading.Event()
  monkeypatch.setattr(written, "commit", lambda *_: go_on.wait())
  opened = store(tmp_path, within=1.0)
  opened.save(1, TREE, toys.experiment())
  with pytest.raises(SaveFailed, match=r"it was not durable and verified in 1 s; no earlier"):
    while True:
      opened.check()
  go_on.set()


def test_a_wall_clock_that_goes_on_by_leaps_fails_no_save(tmp_path, monkeypatch):
  now, leaps = time.time, itertools.count(step=7200)
  waits = lambda: sys._getframe(2).f_code.co_filename.endswith("futures/future.py")
  monkeypatch.setattr(time, "time", lambda: now() + (next(leaps) if waits() else 0))
  with store(tmp_path) as opened:
    opened.save(1, TREE, toys.experiment())
  assert opened.steps() == [1]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
  """A run that was to go on to 20 steps and left behind step 12, and the rows of a whole one."""
  folder = tmp_path_factory.mktemp("twelve")
  whole = train(runs.base(), folder / "whole", quiet=True)

  class Leave(Part):
    def before_step(self, step):
      if step == 11:
        signal.raise_signal(signal.SIGTERM)

  assert train(runs.base(), folder / "run", quiet=True, parts=[Leave()]).left
  return folder / "run", runs.values(whole.directory.path)


@pytest.fixture
def left(twelve, tmp_path):
  shutil.copytree(twelve[0], tmp_path / "run")
  return tmp_path / "run"


def flip(path) -> None:
  """One bit, in the middle of a file."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("kind", ["d/*", "ocdbt.process_0/d/*", "manifest.ocdbt", "_METADATA"])
def test_a_damaged_checkpoint_is_set_aside_and_no_step_is_lost(left, twelve, kind, capsys):
  files = sorted((left / "checkpoints/12").glob(kind))
  for file in files:
    flip(file)
  run = train(runs.base(), left, quiet=True)
  assert runs.values(left) == twelve[1]
  if kind.startswith("d/"):
    assert "12 cannot be read" in capsys.readouterr().err
    (event,) = runs.events(left, "damaged")
    assert event["step"] == 12 and (left / "checkpoints/damaged/12").is_dir()
  assert int(run.state.step) == 20


def test_where_nothing_is_whole_a_flag_is_needed_to_begin_anew(left, twelve):
  for step in (10, 12):
    for file in (left / f"checkpoints/{step}").glob("d/*"):
      flip(file)
  command = ["train", str(runs.ROOT / "tests/runs.py"), "--dir", str(left), "--quiet"]
  for _ in range(2):
    with pytest.raises(NothingWhole, match=r"none is whole: put .*damaged.* restart=T"):
      train(runs.base(), left, quiet=True)
  assert main([*command, "--restart"]) == Exit.DONE
  assert runs.values(left) == twelve[1]


def test_the_first_step_behind_a_restore_is_the_recorded_one(left, twelve):
  train(runs.base(), left, quiet=True)
  (event,) = runs.events(left, "replayed")
  assert event["step"] == 13 and event["differs"] == []


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "data_digest"])
def test_a_first_step_that_is_another_stops_the_run(left, name):
  path = left / "checkpoints/12/next.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {name: values[name] * (1 + 1e-7) + 1e-6}))
  before = runs.saved(left)
  with pytest.raises(CheckFailed, match=rf"step 13, .*{name} is .* and was .*allow_changes=True"):
    train(runs.base(), left, quiet=True)
  assert runs.saved(left) == before
  train(runs.base(), left, quiet=True, allow_changes=True)


@pytest.mark.parametrize("then", [1.0, math.nan])
@pytest.mark.parametrize("where", ["the same", "another mesh"])
def test_a_first_step_that_is_no_number_is_the_same_only_if_it_was_none(
  left, monkeypatch, then, where
):
  path = left / "checkpoints/12/next.json"
  values = json.loads(path.read_text()) | {"loss": then}
  if where != "the same":
    values["where"]["mesh"] = {"fsdp": 99}
  path.write_text(json.dumps(values))
  found = replay.found
  monkeypatch.setattr(replay, "found", lambda metrics: found(metrics) | {"loss": math.nan})
  if math.isnan(then):
    train(runs.base(), left, quiet=True)
  else:
    with pytest.raises(CheckFailed, match=r"loss is nan and was 1\.0"):
      train(runs.base(), left, quiet=True)


def test_on_another_mesh_the_first_step_is_the_same_to_a_tolerance(left):
  path = left / "checkpoints/12/next.json"
  values = json.loads(path.read_text())
  values["where"]["mesh"] = {"fsdp": 99}
  path.write_text(json.dumps(values | {"loss": values["loss"] * 1.001}))
  train(runs.base(), left, quiet=True)
  assert runs.events(left, "replayed")[0]["exact"] is False


@pytest.mark.parametrize(
  "text",
  ["", "{", "[1]", "{}", '{"loss": 1.0, "gradient_norm": 1.0, "data_digest": "1", "where": {}}'],
)
def test_a_first_step_of_which_nothing_can_be_read_is_told(text, left, capsys):
  (left / "checkpoints/12/next.json").write_text(text)
  train(runs.base(), left)
  assert runs.events(left, "not_replayed") and not runs.events(left, "replayed")
  assert "it is not compared" in capsys.readouterr().err


def test_superseded_steps():
  keep, steps = Checkpoints(keep=2, keep_every=10), [5, 10, 15, 20, 25]
  assert checkpoint.superseded(steps, steps, keep) == [5, 15]
  assert checkpoint.superseded(steps, [5, 15, 20], keep) == [5]
  assert checkpoint.superseded(steps, [20], keep) == []
