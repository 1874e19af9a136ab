"""What libraries below raise for causes that people can do something about, said in one message."""

import errno
import os
import re
import sys
from typing import TYPE_CHECKING

from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.phases import Late

if TYPE_CHECKING:
  import jax

STORES = {"gcsfs": "gs://", "s3fs": "s3://", "adlfs": "az://"}
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # How XLA begins to say so, on every device.
REMEDIES = (
  "take a smaller batch or evaluation.batch, more microbatches, shorter rows (data.seq), a model "
  "that keeps less (model.remat), or shards on more devices (mesh.fsdp)"
)


class CheckFailed(Exception):
  """Something is not what it has to be; its message says what, and what to do."""


def explained(error: Exception) -> tuple[str, Exit] | None:
  """The message and the exit code for an error whose traceback helps nobody; None for others."""
  text = str(error)
  if isinstance(error, Refused):
    return text, Exit.REFUSED
  if isinstance(error, CheckFailed):
    return text, Exit.CHECK
  if isinstance(error, Late):
    return text, Exit.DEADLINE
  # Of a full disk tensorstore uses the same word; what could not be written is an OSError.
  if OUT_OF_MEMORY in text and not isinstance(error, OSError):
    found = re.search(r"(\d{7,}) ?bytes", text)
    wanted = f" where {int(found[1]) / 1e9:.1f} GB more were wanted" if found else ""
    return f"the device's memory is full{wanted}: {REMEDIES}", Exit.FAILED
  if found := re.fullmatch(r'Invalid value "(.*)" for JAX flag (\w+)', text):
    return f"{found[2].upper()} is {found[1]!r}, which jax does not take; correct or unset it", (
      Exit.REFUSED
    )
  if isinstance(error, ImportError) and (found := re.search("|".join(STORES), text)):
    return f"{STORES[found[0]]} needs another package: pip install {found[0]}", Exit.REFUSED
  if not isinstance(error, OSError):
    return None
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  return f"{text}{'; free some space, and the same command goes on' if full else ''}", Exit.FAILED


def unraisable(found: "sys.UnraisableHookArgs") -> None:
  """A `sys.unraisablehook`: silent on what follows a checkpoint's failure, which itself is raised.

  Orbax's other reads and writes then find its event loop closed.
  """
  if str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)


def check_memory(compiled: "jax.stages.Compiled") -> None:
  """Refuses a program that takes more memory than there is, where that is the machine's own.

  An accelerator says so itself; a CPU's process is killed without a word.
  """
  import jax

  from bigtrain.mesh import platform

  analysis = compiled.memory_analysis()
  if platform() != "cpu" or analysis is None:
    return
  needs = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
  needs *= jax.local_device_count() if jax.device_count() > 1 else 1
  if needs > (there := physical_memory()):
    raise Refused(
      f"a training step takes {needs / 1e9:.1f} GB of memory and this machine has "
      f"{there / 1e9:.1f}: {REMEDIES}"
    )


def physical_memory() -> int:
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
