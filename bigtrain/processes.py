"""The processes of a run: the same command started several times is one program over all devices.

Who starts them says so in the environment. jax detects most launchers itself; for all others there
are BIGTRAIN_COORDINATOR (host:port of process 0), BIGTRAIN_PROCESSES (how many) and
BIGTRAIN_PROCESS (which one this is, from 0). BIGTRAIN_PROCESSES=1 alone says: no other, whatever
the launcher. BIGTRAIN_TIMEOUT is how many seconds a process waits for the others to start.
"""

import os
import pathlib
import urllib.error
import urllib.request

import jax
from jax.experimental import multihost_utils

from bigtrain.config import Refused

SETTINGS = ("BIGTRAIN_COORDINATOR", "BIGTRAIN_PROCESSES", "BIGTRAIN_PROCESS")
TIMEOUT = 300  # Seconds; jax's own default.


def initialize() -> None:
  """Joins the other processes, if there are any. Called before jax touches a device; twice is fine.

  Raises:
    Refused: wrong or partial settings, or the others could not be reached in time.
  """
  if jax.distributed.is_initialized():
    return
  if any(map(os.environ.get, SETTINGS)):
    explicit = _explicit()
    if explicit is not None:
      # Without "deactivate" jax would also ask the launcher which of the local devices to use.
      _join("BIGTRAIN_COORDINATOR", cluster_detection_method="deactivate", **explicit)
  elif (launcher := _launcher()) is not None:
    _join(launcher)


def is_first() -> bool:
  """Whether this is the process that writes logs and talks to people."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process has come to the barrier of that name."""
  multihost_utils.sync_global_devices(name)


def _explicit() -> dict | None:
  """What the BIGTRAIN variables say, as arguments of jax; None for a single process."""
  said = {name: os.environ.get(name) or None for name in SETTINGS}
  count = _integer("BIGTRAIN_PROCESSES", 1)
  if count == 1 and not said["BIGTRAIN_COORDINATOR"]:
    return None
  if missing := [name for name, value in said.items() if value is None]:
    given = next(name for name, value in said.items() if value is not None)
    raise Refused(
      f"{given} is set but not {' and '.join(missing)}; set all of {', '.join(SETTINGS)} (host:port "
      f"of process 0, how many processes, which one from 0), or none for a single process"
    )
  number = _integer("BIGTRAIN_PROCESS", 0)
  if number >= count:
    raise Refused(
      f"BIGTRAIN_PROCESS is {number}, but BIGTRAIN_PROCESSES is {count}: number them 0 to {count - 1}"
    )
  coordinator = said["BIGTRAIN_COORDINATOR"]
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise Refused(
      f"BIGTRAIN_COORDINATOR is {coordinator!r}; give host:port of process 0, as in 10.0.0.1:8476"
    )
  if count == 1:
    return None
  return {"coordinator_address": coordinator, "num_processes": count, "process_id": number}


def _integer(name: str, least: int, default: int | None = None) -> int | None:
  said = os.environ.get(name)
  if not said:
    return default
  if not said.isdecimal() or int(said) < least:
    raise Refused(f"{name} is {said!r}; give a whole number from {least} on")
  return int(said)


def _launcher() -> str | None:
  """The variable or the service by which a launcher says that there are several processes.

  In jax's order of detection: the first launcher that is present decides.
  """
  if "OMPI_COMM_WORLD_SIZE" in os.environ:
    return "OMPI_COMM_WORLD_SIZE" if int(os.environ["OMPI_COMM_WORLD_SIZE"]) > 1 else None
  # A batch script without srun has SLURM_NTASKS too, but is one process and no step.
  if "SLURM_STEP_NODELIST" in os.environ:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    return name if int(os.environ.get(name, 1)) > 1 else None
  if int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
    return "MEGASCALE_NUM_SLICES"
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    if name in os.environ:
      return name if "," in os.environ[name] else None
  if "TPU_SKIP_MDS_QUERY" not in os.environ and _tpu_attached() and "," in _tpu_workers():
    return "the TPU's metadata server"
  if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
    return "JOB_COMPLETION_INDEX"
  return None


def _tpu_attached() -> bool:
  vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
  return any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors)  # Google.


def _tpu_workers() -> str:
  """The hosts of this TPU slice, separated by commas; empty where no server knows."""
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  path = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
  request = urllib.request.Request(f"http://{server}/{path}", headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=2) as response:
      return response.read().decode()
  except (urllib.error.URLError, TimeoutError):
    return ""


def _join(announced: str, **settings) -> None:
  timeout = _integer("BIGTRAIN_TIMEOUT", 1, TIMEOUT)
  try:
    jax.distributed.initialize(initialization_timeout=timeout, **settings)
  except (RuntimeError, ValueError, OSError) as error:
    cause = str(error).strip().splitlines()[0]
    raise Refused(
      f"{announced} announces several processes, but they did not find each other: {cause}. Check "
      f"that all were started within {timeout} s (BIGTRAIN_TIMEOUT) and reach process 0, or set "
      f"{', '.join(SETTINGS)} yourself; BIGTRAIN_PROCESSES=1 alone for a single process"
    ) from error
