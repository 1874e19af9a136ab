"""Devices that compute wrong, and replicas that are none: each is named."""

import dataclasses

import jax
import numpy as np
import pytest

from bigtrain import digest, processes, self_check
from bigtrain.failures import CheckFailed
from bigtrain.mesh import Mesh
from tests import faulty, runs
from tests.faulty import Plant, kept, trained


def test_a_device_that_computes_wrong_is_named_and_ends_the_run_before_it_saves(
  tmp_path, monkeypatch
):
  right = self_check.answers()

  def spoil(run):
    third = jax.devices()[3]
    answers = right | {third: right[third] ^ np.uint32(4)}
    monkeypatch.setattr(self_check, "answers", lambda: answers)

  said = "device 3 .*of process 0 on .*: 0x[0-9a-f]{8} where 0x[0-9a-f]{8} is right"
  with pytest.raises(CheckFailed, match=rf"at step 12 a device computes wrong: {said}"):
    trained(faulty.nan_in_step_11(), tmp_path, parts=[Plant(10, spoil)])
  about, _ = kept(tmp_path)
  assert about["cause"] == "hardware" and about["again"]["devices"].startswith("device 3 ")
  assert runs.saved(tmp_path) == [4, 8]
  (event,) = runs.events(tmp_path, "bad_device")
  assert event["step"] == 12 and "device 3" in event["found"]


def test_what_every_process_says_is_told(monkeypatch):
  said = ["", "device 0 of process 1", "device 4 of process 2"]
  monkeypatch.setattr(processes, "gather", lambda _: said)
  assert processes.all_said("") == "device 0 of process 1; device 4 of process 2"


@pytest.mark.parametrize("little", [True, False])
def test_a_replica_with_one_other_bit_is_named(tmp_path, monkeypatch, little):
  if not little:
    monkeypatch.setattr(digest, "LITTLE", 0)

  def flip(run):
    leaf = run.leaves[-1]
    mesh = leaf.sharding.mesh
    place = jax.NamedSharding(mesh, jax.P())
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    parts = []
    for i, device in enumerate(mesh.devices.flat):
      mine = whole.copy()
      mine.view(np.uint32)[1, 2] ^= i == 5
      parts.append(jax.device_put(mine, device))
    odd = jax.make_array_from_single_device_arrays(whole.shape, place, parts)
    of_run = type(run).state.fget
    state = lambda run: dataclasses.replace(of_run(run), statistics={"odd": odd})
    monkeypatch.setattr(type(run), "state", property(state))

  e = faulty.base()
  with pytest.raises(CheckFailed, match=r"at step 4 devices that hold .* differ .*device 5 .*odd"):
    trained(e, tmp_path, parts=[Plant(3, flip)])
  assert runs.saved(tmp_path) == []


@pytest.mark.parametrize("little", [True, False])
def test_replicas_are_those_of_the_same_part(monkeypatch, little):
  if not little:
    monkeypatch.setattr(digest, "LITTLE", 0)
  mesh = Mesh(data=4, fsdp=2).make()
  place = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
  with jax.set_mesh(mesh):
    right = jax.device_put(np.arange(40, dtype=np.float32).reshape(5, 8), place)
    each = {shard.device: np.array(shard.data) for shard in right.addressable_shards}
    each[bad := mesh.devices.flat[6]][2, 3] += 1
    parts = [jax.device_put(x, device) for device, x in each.items()]
    odd = jax.make_array_from_single_device_arrays(right.shape, place, parts)
    whole = jax.device_put(np.arange(8), jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    assert self_check.differing({"right": right, "whole": whole}) == {}
    found = self_check.differing({"right": right, "odd": odd, "whole": whole})
  assert found == {bad: "odd"}


def test_who_asks_for_no_self_check_has_none(tmp_path, monkeypatch):
  monkeypatch.setattr(self_check, "wrong", lambda: {jax.devices()[0]: "planted"})
  e = faulty.base()
  with pytest.raises(CheckFailed, match=r"at step 0 .*planted.*experiment.faults.self_check = Fal"):
    trained(e, tmp_path)
  e.steps, e.faults.self_check = 2, False
  trained(e, tmp_path)


def test_devices_are_outvoted_by_the_majority():
  assert self_check.outvoted({"a": 1, "b": 1, "c": 2}) == ["c"]
  assert self_check.outvoted({"a": 1, "b": 2}) == ["a", "b"]
  assert self_check.outvoted({"a": 1, "b": 1}) == []


def test_all_devices_here_know_the_answers():
  assert self_check.wrong() == {}
