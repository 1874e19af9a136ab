"""What a start finds: nothing that is whole is left out, removed or condemned."""

import errno
import functools
import os
import resource
import shutil
import time

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath

from bigtrain import Checkpoints, digest, files, processes, written
from bigtrain.checkpoint import NothingWhole, SaveFailed, Store
from bigtrain.parts import Part
from bigtrain.run_directory import RunDirectory
from bigtrain.saved import Damaged, Saved
from bigtrain.train import train
from tests import faulty, runs, toys

TREE = {"w": np.arange(1200, dtype=np.float32).reshape(40, 30), "n": np.int32(7)}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
SYSTEM = "Input/output error [os_error_code='5'] [tensorstore_spec='{}']"
# As tensorstore 0.1 begins to say errors of a local disk and of a bucket, and as Python does.
PASSING = [
  ValueError(f'UNKNOWN: Error opening "zarr" driver: Error reading {"a path/" * 50}: {SYSTEM}'),
  ValueError('ABORTED: Error opening "zarr" driver: Stale file handle'),
  ValueError('RESOURCE_EXHAUSTED: Error opening "zarr" driver: Too many open files'),
  ValueError("UNAVAILABLE: 503 Service Unavailable"),
  ValueError("DEADLINE_EXCEEDED: Error reading"),
  OSError(errno.EIO, "Input/output error"),
  OSError(errno.ESTALE, "Stale file handle"),
  PermissionError(errno.EACCES, "Permission denied"),
  TimeoutError(),
  MemoryError(),
]
DAMAGE = [
  ValueError('DATA_LOSS: Error opening "zarr" driver: CRC-32C checksum verification failed'),
  ValueError("OUT_OF_RANGE: Requested byte range is not valid for value of size 20"),
  ValueError("NOT_FOUND: Error reading"),
  ValueError("Expecting value: line 1 column 1 (char 0)"),
  FileNotFoundError(errno.ENOENT, "No such file"),
  KeyError("value_metadata"),
  AssertionError(),
]


def store(path, **keep) -> Store:
  return Store(RunDirectory(path).checkpoints, Checkpoints(**keep))


def save(path, *steps: int, **keep) -> None:
  with store(path, **keep) as opened:
    for step in steps:
      opened.save(step, TREE, toys.experiment())


def damage(path, step: int) -> None:
  for file in (path / f"checkpoints/{step}").glob("d/*"):
    file.write_bytes(b"x")


def unexpected(step: int, why: str) -> None:
  raise AssertionError(f"{step}: {why}")


def test_a_run_whose_checkpoints_are_gone_begins_anew_only_when_told(tmp_path):
  train(faulty.base(), tmp_path, quiet=True)
  rows = runs.values(tmp_path)
  shutil.rmtree(tmp_path / "checkpoints")
  for _ in range(2):
    with pytest.raises(NothingWhole, match=r"has had checkpoints and none is whole: .*restart=T"):
      train(faulty.base(), tmp_path, quiet=True)
  assert runs.values(tmp_path) == rows

  class Crash(Part):
    def before_step(self, step):
      if step == 2:
        raise RuntimeError("planted")

  with pytest.raises(RuntimeError, match="planted"):
    train(faulty.base(), tmp_path, quiet=True, restart=True, parts=[Crash()])
  train(faulty.base(), tmp_path, quiet=True)  # Told once: of what it began then nothing was saved.
  assert runs.values(tmp_path) == rows and runs.saved(tmp_path) == [12, 16]


def test_a_run_that_was_killed_in_its_first_save_begins_anew(tmp_path):
  directory = RunDirectory(tmp_path)
  assert not directory.has_saved()
  directory.event("save", step=4)
  assert not directory.has_saved()
  directory.event("verified", step=4)
  assert directory.has_saved()


def test_restart_begins_anew_at_once_where_all_is_damaged(tmp_path):
  train(faulty.base(), tmp_path, quiet=True)
  rows = runs.values(tmp_path)
  for step in (12, 16):
    damage(tmp_path, step)
  train(faulty.base(), tmp_path, quiet=True, restart=True)
  assert runs.values(tmp_path) == rows
  assert [event["step"] for event in runs.events(tmp_path, "damaged")] == [16, 12]


def test_going_back_removes_nothing_before_an_older_one_is_whole(tmp_path):
  save(tmp_path, 2, 4, 8, keep=3)
  damage(tmp_path, 4)
  with store(tmp_path, keep=3) as opened:
    step, _ = opened.newest(LIKE, lambda *_: None, until=4)
    assert (step, opened.steps()) == (2, [2])
  save(tmp_path, 8, keep=3)
  damage(tmp_path, 2)
  with store(tmp_path, keep=3) as opened:
    with pytest.raises(NothingWhole, match="up to step 4 is whole, to go back to; later ones stay"):
      opened.newest(LIKE, lambda *_: None, until=4)
    assert opened.newest(LIKE, unexpected)[0] == 8


@pytest.mark.parametrize("error", PASSING, ids=lambda e: repr(e)[:30])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_may_pass_condemns_no_checkpoint(tmp_path, monkeypatch, error, wrapped):
  def fail(*_, **__):
    if wrapped:
      raise Exception("Encountered error while reading array index") from error  # As orbax does.
    raise error

  save(tmp_path, 3, 5)
  with store(tmp_path) as opened:
    with monkeypatch.context() as failing:
      failing.setattr(opened._reader, "restore", fail)
      with pytest.raises(OSError, match=r"checkpoint .*/5 can just now not be read: \S") as told:
        opened.newest(LIKE, unexpected)
    assert "Input/output error" in str(told.value) or SYSTEM not in str(error)
    assert len(str(told.value)) < 400
    assert opened.newest(LIKE, unexpected)[0] == 5


@pytest.mark.parametrize("error", DAMAGE, ids=repr)
def test_what_cannot_be_decoded_is_damaged(tmp_path, monkeypatch, error):
  def fail(*_, **__):
    raise error

  save(tmp_path, 3)
  saved = Saved(RunDirectory(tmp_path).checkpoints)
  monkeypatch.setattr(saved._reader, "metadata", fail)
  with pytest.raises(Damaged, match=r"checkpoint .*/3 cannot be read: \S"):
    saved.restore(3, LIKE)


def test_too_many_open_files_condemn_no_checkpoint(tmp_path):
  save(tmp_path, 3, 5)
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)
  with store(tmp_path) as opened:
    open_files = max(map(int, os.listdir("/proc/self/fd")))
    for more in range(2, 8):
      resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + more, limit[1]))
      try:
        opened.newest(LIKE, unexpected)
      except OSError as error:
        assert "Too many open files" in str(error) or "EMFILE" in str(error.__cause__), error
      finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert opened.newest(LIKE, unexpected)[0] == 5


@pytest.mark.parametrize("error", [MemoryError, TimeoutError])
def test_an_error_without_a_word_is_none_the_less_one(tmp_path, monkeypatch, error):
  def fail(_):
    raise error

  save(tmp_path, 3)
  monkeypatch.setattr(digest, "of_arrays", fail)
  with pytest.raises(OSError, match=f"just now not be read: {error.__name__}"):
    Saved(RunDirectory(tmp_path).checkpoints).restore(3, LIKE)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
  def fail(_):
    raise OSError(errno.ESTALE, "Stale file handle")

  save(tmp_path, 3)
  with store(tmp_path) as opened:
    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(OSError, match="Stale"):
      opened.newest(LIKE, unexpected)


def test_a_process_takes_the_step_that_the_first_one_has_listed(tmp_path, monkeypatch):
  """It is the second of two, whose folder still has an older list."""
  save(tmp_path, 3, 5)
  opened, listed, looks = store(tmp_path), Saved.steps, iter([[3], [3]])

  def gather(fact):
    first = {list: [3, 5], dict: None}.get(type(fact))
    return [fact | {"why": None} if isinstance(fact, dict) and "why" in fact else first, fact]

  monkeypatch.setattr(processes, "is_first", lambda: False)
  monkeypatch.setattr(processes, "gather", gather)
  monkeypatch.setattr(Saved, "steps", lambda self: next(looks, None) or listed(self))
  assert opened.newest(LIKE, unexpected)[0] == 5
  monkeypatch.setattr(Saved, "steps", lambda self: [3])
  monkeypatch.setattr(files, "VISIBLE", 0.0)
  with pytest.raises(
    OSError, match=r"/5 can just now not be read: it is not seen .*, in process 1"
  ):
    opened.newest(LIKE, unexpected)
  assert listed(opened) == [3, 5]


def test_a_save_whose_reading_back_was_cut_off_is_committed_when_it_was_restored(
  tmp_path, monkeypatch
):
  def killed(*_):
    raise OSError("killed")

  save(tmp_path, 1)
  with monkeypatch.context() as killing:
    killing.setattr(written, "commit", killed)
    with pytest.raises(SaveFailed, match="that of step 1 is whole"), store(tmp_path) as opened:
      opened.save(2, TREE, toys.experiment())
  with store(tmp_path) as opened:
    assert (opened.steps(), opened.committed()) == ([1, 2], [1])
    opened.save(3, TREE, toys.experiment())
    opened.wait()
    assert opened.steps() == [1, 2, 3]  # Two that are verified are kept.
  shutil.rmtree(tmp_path / "checkpoints/3")
  with store(tmp_path) as opened:
    assert opened.newest(LIKE, unexpected)[0] == 2
    assert opened.committed() == [1, 2]


def test_an_array_without_a_digest_is_not_restored(tmp_path, monkeypatch):
  of_arrays = digest.of_arrays
  with monkeypatch.context() as forgetting:
    forgetting.setattr(digest, "of_arrays", lambda x: of_arrays({"n": x["n"]}))
    save(tmp_path, 3)
  saved = Saved(RunDirectory(tmp_path).checkpoints)
  with pytest.raises(Damaged, match="w have no digests"):
    saved.restore(3, LIKE)
  assert saved.restore(3, {"n": LIKE["n"]})["n"] == 7


class Bucket(backend._OsPathBackend):
  """A folder that stands for all buckets."""

  def __init__(self, folder):
    self.folder = f"{folder}/"
    for name in ("exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "stat", "glob"):
      setattr(self, name, functools.partial(self._there, getattr(self, name)))

  def _there(self, call, path, *more, **fields):
    found = call(os.fspath(path).replace("gs://", self.folder), *more, **fields)
    return [f.replace(self.folder, "gs://") for f in found] if isinstance(found, list) else found


def test_what_another_run_may_be_saving_on_a_bucket_stays(tmp_path, monkeypatch):
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket(tmp_path))
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  folder = tmp_path / "b/checkpoints"
  long_ago = time.time() - 100
  for place in ("2", "4", "5", "damaged/1"):
    (folder / place).mkdir(parents=True)
    (folder / place / "_METADATA").touch()
  (folder / "2/commit_success.txt").touch()
  for place in ("2", "4", "damaged/1"):
    os.utime(folder / place / "_METADATA", (long_ago, long_ago))
  os.utime(folder / "damaged/1", (long_ago, long_ago))
  opened = Store(epath.Path("gs://b/checkpoints"), Checkpoints(within=50))
  assert opened.steps() == [2]
  assert sorted(path.name for path in folder.iterdir()) == ["2", "5", "damaged"]
  opened._clear_for(5)  # Before a save of that very step.
  assert sorted(path.name for path in folder.iterdir()) == ["2", "damaged"]
