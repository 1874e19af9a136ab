"""Chips and their networks: what a topology's name means, each number with its source.

Sources: [cloud] docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}; [book] "How to scale your model",
jax-ml.github.io/scaling-book/tpus, whose link figures are what is reached; [nvidia] data sheets.
"""

import dataclasses
import math
import os
import re
from typing import Any

from bigtrain.config import Refused, nearest

GiB = 2**30
# What libtpu and jax read when they start, for a machine without the chips.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
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
  platform: str = "tpu"


# HBM is what libtpu says it has, in its out-of-memory messages. The clock is that at which all
# matrix units together reach the peak; by it the compiler gives a large product at most 98% of the
# peak (85% on v6e).
CHIPS = {
  # [cloud] 197 TFLOP/s, 393 TOP/s, 16 GB, 819 GB/s. [book] 45 GB/s a link, 2D; DCN 25 GB/s a host.
  "v5e": Chip("TPU v5 lite", 15.75 * GiB, 8.19e11, 197e12, 393e12, 1.5e9, 4.5e10, 2, "16", 3.125e9),
  # [cloud] 459 TFLOP/s, 95 GB, 2765 GB/s. [book] 918 TOP/s, 90 GB/s a link, 3D; DCN as above.
  "v5p": Chip("TPU v5", 95.73 * GiB, 2.765e12, 459e12, 918e12, 1.75e9, 9e10, 3, "4", 6.25e9),
  # [cloud] 918 TFLOP/s, 1836 TOP/s, 32 GB, 1638 GB/s. [book] 90 GB/s a link, 2D.
  "v6e": Chip(
    "TPU v6 lite", 31.24 * GiB, 1.638e12, 918e12, 1836e12, 1.75e9, 9e10, 2, "16", 1.25e10
  ),
  # [nvidia] 989 TFLOP/s, 1979 TOP/s, 80 GB, 3.35 TB/s; NVLink 450 GB/s one way; 400 Gb/s a GPU.
  "h100": Chip("NVIDIA H100", 80e9, 3.35e12, 989e12, 1979e12, 0, 4.5e11, 1, "", 5e10, "gpu"),
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
    if self.chip.platform == "gpu":
      raise Refused(
        f"--topology {self.name}: GPU programs are compiled by jax's CUDA plugin, which is not "
        "installed here: pip install 'bigtrain[cuda]'"
      )
    more = {} if self.slices == 1 else {"num_slices": self.slices}
    try:
      made = topologies.get_topology_desc(self.name, platform="tpu", **more)
    except Exception as error:  # jaxlib's own classes, by version.
      if "libtpu" in str(error).lower() or isinstance(error, ImportError):
        raise Refused(
          "TPU programs are compiled by libtpu, which is not installed here: pip install "
          "'bigtrain[tpu]' (on Python 3.12 or later)"
        ) from error
      raise Refused(f"--topology {self.name}: the compiler takes none such: {error}") from error
    return list(made.devices)


def topology(name: str, slices: int = 1) -> Topology:
  """What a name such as "v5e:4x4" or "h100:8" means.

  Raises:
    Refused: there is no such chip, or that is no shape of its torus.
  """
  kind, _, sizes = name.partition(":")
  if kind not in CHIPS:
    raise Refused(f"--topology {name}: there is no chip {kind!r}{nearest(kind, CHIPS)}")
  chip = CHIPS[kind]
  example = "x".join(("8",) if chip.platform == "gpu" else ("4",) * chip.axes)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != chip.axes:
    raise Refused(
      f"--topology {name}: a {kind} slice is a grid of {chip.axes} axes; write {kind}:{example}"
    )
  if slices < 1:
    raise Refused(f"--slices {slices}: there is at least 1 slice")
  return Topology(name, chip, tuple(map(int, sizes.split("x"))), slices)


def prepare() -> None:
  """Sets what the compiler's libraries read when they are loaded, where nobody has set it."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
