"""The mesh: how many devices each axis spans, and which devices these are."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from bigtrain import hints
from bigtrain.config import Refused, config

# From the slowest network to the fastest: neighbours along a later axis are nearer to each other.
AXES = ("slices", "pipeline", "data", "fsdp", "expert", "context", "ulysses", "tensor", "sequence")
# An axis under another name, by which it is used differently: its size is that of the other field.
OTHER_NAMES = {"ulysses": "context", "sequence": "tensor"}


@config
class Mesh:
  """How many devices each mesh axis spans. At most one axis may be -1: what the others leave."""

  data: int = 1  # Replicas of the parameters.
  fsdp: int = -1  # Shards of the batch, the parameters and the optimizer state.
  tensor: int = 1  # Shards of heads, hidden units and vocabulary.
  context: int = 1  # Shards of the positions of each row; they share the parameters like fsdp.
  expert: int = 1  # Shards of the experts; for all that is no expert they are more fsdp.
  pipeline: int = 1  # Stages: shards of the layers.
  slices: int = 1  # Replicas across the slow network between slices, outside `data`.
  # Attention exchanges positions for heads over `context` (all-to-all, arXiv:2309.14509), where it
  # otherwise passes keys and values around (a ring, arXiv:2310.01889).
  ulysses: bool = False
  sequence: bool = False  # `tensor` also shards the positions of the residual stream.

  def shape(self, devices: int, where: str = "attached") -> dict[str, int]:
    """The size of every axis on that many devices; `where` these are is for the message.

    Raises:
      Refused: the axes do not multiply to `devices`, or more than one is -1.
    """
    sizes = {axis: 1 if axis in OTHER_NAMES else getattr(self, axis) for axis in AXES}
    said = ", ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1 or axis in USUAL)
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [axis for axis, size in sizes.items() if size < 1 and size != -1] or free[1:]
    if wrong:
      raise Refused(
        f"mesh ({said}): sizes are positive, and one axis at most is -1 (what is left); set "
        f"{hints.to_set(f'mesh.{wrong[0]}', 1)} or more"
      )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
      sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
      others = "the other axes"
      if not free:
        others = f"{hints.either('mesh.fsdp -1', 'mesh.fsdp = -1')} and the other axes"
      here = where == "attached" and jax.process_count() == 1
      cpu = here and jax.default_backend() == "cpu"
      raise Refused(
        f"mesh wants {'a multiple of ' if free else ''}{fixed} devices ({said}) but {devices} "
        f"{'is' if devices == 1 else 'are'} {where}; set {others} to a divisor of {devices} to "
        f"use what is there{f', or JAX_NUM_CPU_DEVICES={fixed} to try it on CPU' if cpu else ''}"
      )
    for other, axis in OTHER_NAMES.items():
      if getattr(self, other):
        if sizes[axis] == 1:
          raise Refused(
            f"mesh.{other} is a way to use mesh.{axis}, which spans one device; set "
            f"{hints.to_set(f'mesh.{axis}', 2)} or more, or {hints.to_set(f'mesh.{other}', False)}"
          )
        sizes[axis], sizes[other] = 1, sizes[axis]
    return sizes

  def make(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over these devices (all that are attached), every axis explicit.

    Raises:
      Refused: `slices` are not those of the hardware.
    """
    devices = devices or jax.devices()
    sizes = self.shape(len(devices))
    there = len({getattr(device, "slice_index", None) for device in devices})
    if there > 1 and sizes["slices"] != there:
      raise Refused(f"these devices are {there} slices; set {hints.to_set('mesh.slices', there)}")
    # An axis may be a part of one of the torus, where it is no product of whole ones.
    split = {"allow_split_physical_axes": True}
    if there == 1:  # Also where a network that is not slow stands for the one between slices.
      grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
    else:
      within, across = dict(sizes, slices=1), dict.fromkeys(sizes, 1) | {"slices": there}
      grid = mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), tuple(across.values()), devices, **split
      )
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    return jax.sharding.Mesh(np.asarray(grid), tuple(sizes), axis_types=explicit)


USUAL = ("data", "fsdp", "tensor")  # Named in messages even where they span one device.


def platform() -> str:
  """Of the devices that a program is traced for: "cpu", "tpu" or "gpu".

  They are the mesh's, which may be of a topology that is not attached; without a mesh, jax's own.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """As `platform`, what jax calls these devices: "TPU v5 lite", say."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (jax.devices()[0] if device is None else device).device_kind


def ordered(axes: Collection[str]) -> tuple[str, ...]:
  """These axes in the order of the mesh.

  A set has another order in every process, in which jax would lay out the groups of a collective:
  processes whose programs differ wait for each other for ever.
  """
  return tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
