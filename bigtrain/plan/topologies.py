"""Chips and their networks: what a topology's name means, each number with its source.

Sources: [cloud] docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}; [book] "How to scale your model",
jax-ml.github.io/scaling-book/tpus, whose link figures are what is reached; [nvidia] data sheets.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from bigtrain import hints
from bigtrain.config import Refused, nearest

GiB = 2**30
COMPILERS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda13_plugin", "cuda")}  # Package, extra.
# What XLA is told of a GPU that it does not see, as its GpuTargetConfigProto [nvidia].
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What libtpu and jax read when they start, for a machine without the chips.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # Else a CUDA plugin wants to see its GPU.
  "TPU_SKIP_MDS_QUERY": "1",  # No metadata server is asked.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Else a second process dies on a lock file.
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # Any; unset, libtpu complains on standard error.
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as jax counts them: on a TPU that is a chip."""

  kind: str  # jax's device_kind.
  hbm: float  # Bytes that a program can have.
  bandwidth: float  # Of that memory, bytes a second.
  bf16: float  # Peak FLOP/s.
  int8: float  # Peak OP/s.
  clock: float  # Hz of the cycles that the compiler counts; 0 where it counts none.
  link: float  # Bytes a second that one ICI link carries one way.
  axes: int  # Of the torus; two links along each.
  wraps: str  # When an axis of the torus is closed: its size is a multiple of "4", or is "16".
  dcn: float  # Bytes a second to other slices, for each chip.
  host: float  # Bytes a second to the memory of its host, and as many from it.
  platform: str = "tpu"


# HBM is what libtpu says it has, in its out-of-memory messages. The clock is that at which all
# matrix units together reach the peak; by it the compiler gives a large product at most 98% of the
# peak (85% on v6e). [book] 16 GB/s between a chip and its host, 32 on v6e.
CHIPS = {
  # [cloud] 197 TFLOP/s, 393 TOP/s, 16 GB, 819 GB/s. [book] 45 GB/s a link, 2D; DCN 25 GB/s a host.
  "v5e": Chip(
    "TPU v5 lite", 15.75 * GiB, 8.19e11, 197e12, 393e12, 1.5e9, 4.5e10, 2, "16", 3.125e9, 1.6e10
  ),
  # [cloud] 459 TFLOP/s, 95 GB, 2765 GB/s. [book] 918 TOP/s, 90 GB/s a link, 3D; DCN as above.
  "v5p": Chip(
    "TPU v5", 95.73 * GiB, 2.765e12, 459e12, 918e12, 1.75e9, 9e10, 3, "4", 6.25e9, 1.6e10
  ),
  # [cloud] 918 TFLOP/s, 1836 TOP/s, 32 GB, 1638 GB/s, DCN 800 Gb/s a host of 8. [book] 90 GB/s a
  # link, 2D.
  "v6e": Chip(
    "TPU v6 lite", 31.24 * GiB, 1.638e12, 918e12, 1836e12, 1.75e9, 9e10, 2, "16", 1.25e10, 3.2e10
  ),
  # [nvidia] 989 TFLOP/s, 1979 TOP/s, 80 GB, 3.35 TB/s; one way NVLink 450 GB/s, PCIe 64 GB/s; 400
  # Gb/s a GPU.
  "h100": Chip(
    "NVIDIA H100", 80e9, 3.35e12, 989e12, 1979e12, 0, 4.5e11, 1, "", 5e10, 6.4e10, "gpu"
  ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many slices of chips in a torus."""

  name: str  # Such as "v5p:2x2x4".
  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def devices(self) -> list[Any]:
    """Devices that programs can be compiled for, and nothing can run on.

    Raises:
      Refused: the compiler for them is not installed, or knows no such topology.
    """
    from jax.experimental import topologies

    prepare()
    package, extra = COMPILERS[self.chip.platform]
    if importlib.util.find_spec(package) is None:
      raise Refused(
        f"--topology {self.name}: programs for it are compiled by {package}, which is not "
        f"installed here: {hints.installed(extra, '3.12' if extra == 'tpu' else None)}"
      )
    more: dict[str, Any] = {} if self.slices == 1 else {"num_slices": self.slices}
    if self.chip.platform == "gpu":
      # Hosts of so many GPUs each.
      more = {"topology": f"{self.slices}x{self.shape[0]}x1", "target_config": H100}
    try:
      if self.chip.platform == "gpu":
        made = topologies.get_topology_desc(platform="cuda", **more)
      else:
        made = topologies.get_topology_desc(self.name, platform="tpu", **more)
    except Exception as error:  # jaxlib's own classes, by version.
      cause = str(error).strip().split("\n")[0][:200]
      raise Refused(
        f"--topology {self.name}: the compiler knows no such slice ({cause}); take one that the "
        "cloud offers, such as v5e:4x4, v5p:2x2x4 or v6e:8x8"
      ) from error
    return list(made.devices)


def topology(name: str, slices: int = 1, flag: str = "--topology") -> Topology:
  """What a name such as "v5e:4x4" or "h100:8", which that flag gave, means.

  Raises:
    Refused: there is no such chip, or that is no shape of its torus.
  """
  kind, _, sizes = name.partition(":")
  if kind not in CHIPS:
    raise Refused(f"{flag} {name}: there is no chip {kind!r}{nearest(kind, CHIPS)}")
  chip = CHIPS[kind]
  example = "x".join(("8",) if chip.platform == "gpu" else ("4",) * chip.axes)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != chip.axes:
    wanted = f"a {kind} slice is a grid of {chip.axes} axes, each of a positive number"
    wanted = "give a number" if chip.axes == 1 else wanted
    raise Refused(f"{flag} {name}: {wanted} of chips, as in {kind}:{example}")
  if slices < 1:
    raise Refused(f"--slices {slices}: there is at least 1 slice")
  return Topology(name, chip, tuple(map(int, sizes.split("x"))), slices)


def prepare() -> None:
  """Sets what the compiler's libraries read when they are loaded, where nobody has set it."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
