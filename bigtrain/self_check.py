"""The self-check: whether every device still computes what it should, and replicas are replicas.

A chip that computes wrong does not say so. So each device makes a small program whose answer is
known to the bit, and what several devices hold of the state is compared between them: at the start,
and before anything is saved, so that no checkpoint has what a bad chip has made of it.
"""

import functools
import math
import socket
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from bigtrain import digest, leaves, processes, sharding
from bigtrain.failures import CheckFailed
from bigtrain.hints import to_set
from bigtrain.parts import Part
from bigtrain.phases import within

if TYPE_CHECKING:
  from bigtrain.run import Run

SIDE = {"cpu": 128}  # Of the matrices of the known-answer program, by platform.
LARGE = 1024  # On all others.
MULTIPLIER = 2654435761  # 2^32 over the golden ratio, odd.
SPAN = 17  # Elements are -8 to 8: all sums are exact in any order, also of products in bfloat16.


class SelfCheck(Part):
  """Ends the run where a device computes wrong, or replicas of the state differ.

  All processes end, by a message that names the devices of all of them.
  """

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    self.check(step)

  def on_away(self, phase: str) -> None:
    if phase == "save":
      self.check(int(self.run.state.step))

  def check(self, step: int) -> None:
    """Raises CheckFailed, on all processes."""
    if not self.run.experiment.faults.self_check:
      return
    with within("self_check"):
      found = {
        "a device computes wrong": wrong(),
        "devices that hold the same part of the state differ in it": differing(self.run.state),
      }
    told = [
      f"{what}: {'; '.join(f'{place(device)}: {why}' for device, why in devices.items())}"
      for what, devices in found.items()
      if devices
    ]
    if said := processes.all_said(" and ".join(told)):
      self.run.directory.event("bad_device", step=step, found=said)
      raise CheckFailed(
        f"at step {step} {said}. Nothing was saved since; take that device out of the job and go "
        f"on with the same command, or leave this check out: {to_set('faults.self_check', False)}"
      )


def place(device: Any) -> str:
  """Of which process a device is, and where it stands."""
  coords = getattr(device, "coords", None)
  at = f" at {tuple(coords)}" if coords is not None else ""
  here = f" on {socket.gethostname()}" if device.process_index == jax.process_index() else ""
  return f"device {device.id}{at} ({device.device_kind}) of process {device.process_index}{here}"


def wrong() -> dict[Any, str]:
  """The devices of this process whose answers are not the known ones, and how these differ."""
  found = answers()
  expected = known()
  told = {
    device: f"{got[0]:#010x} where {expected:#010x} is right"
    for device, got in found.items()
    if int(got[0]) != expected
  }
  for device in outvoted({device: int(got[1]) for device, got in found.items()}):
    told.setdefault(device, "its exponentials and roots are not those of its neighbours")
  return told


def answers() -> dict[Any, np.ndarray]:
  """Of each device of this process what the known-answer program gives there, (2,) uint32."""
  devices = jax.local_devices()
  mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
  compute = _program(mesh, SIDE.get(devices[0].platform, LARGE))
  start = jax.device_put(np.zeros(len(devices), np.uint32), jax.NamedSharding(mesh, P("devices")))
  with jax.set_mesh(mesh):  # Of this process alone, whatever mesh the run has.
    found = compute(start)
  return {shard.device: np.asarray(shard.data)[0] for shard in found.addressable_shards}


@functools.cache
def _program(mesh: jax.sharding.Mesh, side: int):
  def local(start):
    a, b = (elements(start[0] + np.uint32(i), side) for i in (1, 2))
    exact = jnp.uint32(0)
    for dtype in (jnp.float32, jnp.bfloat16):
      product = jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
      exact = digest.followed(exact, total(product.astype(jnp.int32)))
    unsigned = lambda x: x.astype(jnp.int32).astype(jnp.uint32)
    words = digest.mixed(unsigned(a) * np.uint32(MULTIPLIER) ^ unsigned(b))
    exact = digest.followed(exact, jnp.sum(words, dtype=jnp.uint32))
    smooth = jnp.exp(-jnp.abs(a)) + jax.lax.rsqrt(jnp.abs(b) + 1) + jnp.tanh(a * 0.1)
    alike = total(jax.lax.bitcast_convert_type(smooth, jnp.int32))
    return jnp.stack([exact, alike])[None]

  spec = P("devices")
  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def elements(start, side: int, numbers: Any = jnp):
  """(side, side) whole float32 numbers; `numbers` is jax's numpy or numpy's."""
  at = numbers.arange(side * side, dtype=numbers.uint32) + start * (side * side)
  found = (digest.mixed(at) % np.uint32(SPAN)).astype(numbers.float32) - SPAN // 2
  return found.reshape(side, side)


def total(x):
  """The sum of hashes of (side, side) int32 and of their places."""
  words = x.astype(jnp.uint32).reshape(-1)
  return jnp.sum(
    digest.mixed(words ^ digest.mixed(jnp.arange(len(words), dtype=jnp.uint32))), dtype=jnp.uint32
  )


@functools.cache
def known() -> int:
  """The answer, by numpy on the host."""
  side = SIDE.get(jax.local_devices()[0].platform, LARGE)
  a, b = (elements(i, side, np) for i in (1, 2))
  place = digest.mixed(np.arange(side * side, dtype=np.uint32))
  summed = lambda words: np.sum(words, dtype=np.uint32, keepdims=True).reshape(1)
  # In float64 numpy's product is exact too.
  product = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32).astype(np.uint32)
  exact = np.zeros(1, np.uint32)  # A scalar would warn of its overflow.
  for _ in range(2):
    exact = digest.followed(exact, summed(digest.mixed(product.reshape(-1) ^ place)))
  unsigned = lambda x: x.astype(np.int32).astype(np.uint32)
  words = digest.mixed(unsigned(a) * np.uint32(MULTIPLIER) ^ unsigned(b))
  return int(digest.followed(exact, summed(words))[0])


def differing(tree) -> dict[Any, str]:
  """The devices of this process whose part of an array is not that of the others that hold it.

  Of two that differ both are named. All processes take part.
  """
  shared = {name: x for name, x in leaves.flatten(tree).items() if _is_shared(x)}
  told: dict[Any, str] = {}
  for name, hashes_D in _hashes(shared).items():
    place = shared[name].sharding
    # Along the axes that shard it lie its parts, along the others the replicas of each.
    grid = place.mesh.devices
    split = [place.mesh.axis_names.index(axis) for axis in _split(place)]
    order = (*split, *(i for i in range(grid.ndim) if i not in split))
    parts = math.prod(grid.shape[i] for i in split)
    by_part = lambda x, order=order, parts=parts: x.transpose(order).reshape(parts, -1)
    hashes, devices = by_part(hashes_D.reshape(grid.shape)), by_part(grid)
    for part in np.flatnonzero((hashes != hashes[:, :1]).any(axis=1)):
      for device in outvoted(dict(zip(devices[part], hashes[part].tolist(), strict=True))):
        told.setdefault(device, name)
  return {d: name for d, name in told.items() if d.process_index == jax.process_index()}


def outvoted(votes: Mapping[Any, int]) -> list[Any]:
  """Who is not of the majority; everybody where there is none."""
  if len(set(votes.values())) < 2:
    return []
  (value, most), (_, next_most), *_ = Counter(votes.values()).most_common()
  return [device for device, vote in votes.items() if most == next_most or vote != value]


def _is_shared(x) -> bool:
  """Whether several devices hold the same of it."""
  if not isinstance(x, jax.Array) or not isinstance(x.sharding, jax.NamedSharding):
    return False
  sizes = x.sharding.mesh.shape
  return x.size > 0 and x.sharding.mesh.size > math.prod(sizes[a] for a in _split(x.sharding))


def _split(place: jax.NamedSharding) -> list[str]:
  """The axes that shard an array, in the order of the mesh."""
  found = sharding.axes_of(place.spec)
  return [axis for axis in place.mesh.axis_names if axis in found]


def _hashes(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
  """(devices,) numbers for what each device of the mesh holds of an array, by its name.

  Little is quicker read by the host than its program is compiled.
  """
  if not arrays:
    return {}
  places: list[Any] = [x.sharding for x in arrays.values()]
  mesh = places[0].mesh
  little = sum(x.nbytes for x in arrays.values()) < digest.LITTLE
  if little and all(x.is_fully_addressable for x in arrays.values()):

    def on_host(x: jax.Array) -> np.ndarray:
      crc = {s.device: zlib.crc32(np.asarray(s.data).tobytes()) for s in x.addressable_shards}
      return np.array([crc[device] for device in mesh.devices.flat])

    return {name: on_host(x) for name, x in arrays.items()}
  compute = _compiled(mesh, tuple(place.spec for place in places))
  found_DN = np.asarray(compute(list(arrays.values())).addressable_shards[0].data)
  return dict(zip(arrays, found_DN.T, strict=True))


@functools.lru_cache(maxsize=4)
def _compiled(mesh: jax.sharding.Mesh, specs: tuple[P, ...]):
  """(devices, arrays) uint32 of arrays laid out like this, on every device."""

  def local(parts):
    own = jnp.stack([digest.of_part(x) for x in parts])
    return jax.lax.all_gather(own, mesh.axis_names)

  over_all = jax.shard_map(
    local, mesh=mesh, in_specs=(list(specs),), out_specs=P(), check_vma=False
  )
  on_device = lambda x: jax.device_put(x, jax.memory.Space.Device)  # It may wait in the host's.
  return jax.jit(lambda arrays: over_all(jax.tree.map(on_device, arrays)))
