"""Which devices a mesh axis spans where the hardware has slices."""

import dataclasses

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.mesh import Mesh


@dataclasses.dataclass(frozen=True)
class Device:
  """What jax's meshes ask of a device."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "a test"


# Two slices of four, in an order that mixes them.
DEVICES = [Device(i, i % 2) for i in range(8)]


def test_only_the_outer_axis_goes_from_slice_to_slice():
  made = Mesh(slices=2, fsdp=2, tensor=2).make(DEVICES)
  assert made.shape["slices"] == 2
  slices = np.vectorize(lambda device: device.slice_index)(made.devices)
  along = np.moveaxis(slices, made.axis_names.index("slices"), 0).reshape(2, -1)
  assert along.tolist() == [[0] * 4, [1] * 4]
  assert sorted(d.id for d in made.devices.flat) == [*range(8)]


def test_a_mesh_of_other_slices_than_the_hardware_has_is_refused():
  with pytest.raises(Refused, match=r"these devices are 2 slices; set .*mesh.slices"):
    Mesh(fsdp=8).make(DEVICES)


@dataclasses.dataclass(frozen=True)
class Chip(Device):
  """One of a torus."""

  coords: tuple[int, ...] = ()
  core_on_chip: int = 0


def test_an_axis_may_be_a_part_of_one_of_the_torus():
  chips = [
    Chip(i, 0, platform="tpu", device_kind="TPU v5", coords=place)
    for i, place in enumerate(np.ndindex(8, 8, 8))
  ]
  made = Mesh(fsdp=32, expert=16).make(chips)
  assert (made.shape["fsdp"], made.shape["expert"]) == (32, 16)
  assert sorted(chip.id for chip in made.devices.flat) == [*range(512)]
  whole = np.asarray([chip.coords for chip in Mesh(fsdp=64, tensor=8).make(chips).devices.flat])
  along = whole.reshape(64, 8, 3)  # Where they do, axes are whole ones: one coordinate changes.
  assert ((np.ptp(along, axis=1) > 0).sum(1) == 1).all()
