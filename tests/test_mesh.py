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
