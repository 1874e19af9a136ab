"""The processes of a run: the same command started several times is one program over all devices.

Who starts them says so in the environment. jax detects most launchers itself; for all others there
are BIGTRAIN_COORDINATOR (host:port of process 0), BIGTRAIN_PROCESSES (how many) and
BIGTRAIN_PROCESS (which one this is, from 0). BIGTRAIN_PROCESSES=1 alone says: no other, whatever
the launcher. BIGTRAIN_TIMEOUT is how many seconds a process waits for the others to start.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from bigtrain.config import Refused
from bigtrain.phases import Late, within

SETTINGS = ("BIGTRAIN_COORDINATOR", "BIGTRAIN_PROCESSES", "BIGTRAIN_PROCESS")
TIMEOUT = 300  # Seconds; jax's own default.
_met = threading.Event()  # Set when the processes have come together, or there is one.


def initialize() -> None:
  """Joins the other processes, if there are any. Called before jax touches a device; twice is fine.

  Raises:
    Refused: wrong or partial settings, or the launcher's are not what jax needs.
    Late: the others could not be reached in time.
  """
  if jax.distributed.is_initialized() or os.environ.get("BIGTRAIN_PROCESSES") == "1":
    pass
  elif any(map(os.environ.get, SETTINGS)):
    # Unless deactivated, jax asks the launcher which local devices this process may use.
    _join("BIGTRAIN_COORDINATOR", cluster_detection_method="deactivate", **_explicit())
  elif (launcher := _launcher()) is not None:
    # For SLURM and Open MPI jax takes one device a process unless told; an empty list is no limit.
    _join(launcher, **({"local_device_ids": []} if _has_host() else {}))
  _met.set()


def is_first() -> bool:
  """Whether this is the process that writes logs and talks to people."""
  return jax.process_index() == 0


def number() -> int | None:
  """Which process this is, from 0; None before `initialize` is done. It touches no device."""
  return distributed.global_state.process_id if _met.is_set() else None


def coordination() -> tuple[Any, int, int] | None:
  """The client of jax's coordination service, which process this is, and of how many.

  None where there is one process, or before the processes have met: whoever calls a client that is
  about to connect is ended by it. It touches no device.
  """
  state = distributed.global_state  # No public name leads there; orbax goes the same way.
  if not _met.is_set() or state.client is None or state.num_processes == 1:
    return None
  return state.client, state.process_id, state.num_processes


def gather(fact: Any) -> list[Any]:
  """What each process says, in their order. All of them call this, with what JSON can hold."""
  if jax.process_count() == 1:
    return [fact]
  own_N = np.frombuffer(json.dumps(fact).encode(), np.uint8)
  with within("agree"):
    lengths_P = multihost_utils.process_allgather(np.array([len(own_N)], np.int32))[:, 0]
    padded_N = np.pad(own_N, (0, int(lengths_P.max()) - len(own_N)))
    all_PN = multihost_utils.process_allgather(padded_N)
  return [json.loads(row[:n].tobytes()) for row, n in zip(all_PN, lengths_P, strict=True)]


def agree(**facts) -> None:
  """Meets all processes, and goes on only if they were told the same.

  Raises:
    Refused: on all of them, with the names of the facts that differ, and the hosts on which.
  """
  own = {name: zlib.crc32(repr(fact).encode()) for name, fact in facts.items()}
  if differ := differences(gather({"host": socket.gethostname(), "facts": own})):
    where = "; ".join(f"{name} on {', '.join(hosts)}" for name, hosts in differ.items())
    raise Refused(
      f"the processes differ in {', '.join(differ)}: {where}, unlike the others; start all by the "
      "same command, with the same files and one run directory that all of them see"
    )


def any_said(text: str) -> str:
  """Meets all processes; what the first of them said that said anything, "" if none did."""
  return next(filter(None, gather(text)), "")


def all_said(text: str) -> str:
  """Meets all processes; what any of them said, in their order."""
  return "; ".join(filter(None, gather(text)))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
  """In here all processes do the same; where one is refused or fails, all of them hear of it.

  Raises:
    Its own error on the process that failed; on the others Refused if it was, or OSError.
  """
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  refused = isinstance(failure, Refused)
  own = {"host": socket.gethostname(), "refused": refused, "why": failure and str(failure)}
  told = gather(own)
  if failure is not None:
    raise failure
  failed = [(i, t) for i, t in enumerate(told) if t["why"] is not None]
  if failed:
    lines = [f"{what}, on {called(i, t['host'])}: {t['why']}" for i, t in failed[:8]]
    raise (Refused if any(t["refused"] for _, t in failed) else OSError)("\n".join(lines))


def differences(told: Sequence[dict]) -> dict[str, list[str]]:
  """By name of a fact, the processes with another than most: each told its host and its facts."""
  found = {}
  for name in dict.fromkeys(name for each in told for name in each["facts"]):
    values = [each["facts"].get(name) for each in told]
    usual = max(values, key=values.count)  # Of the first process, where it is as frequent.
    odd = [called(i, each["host"]) for i, each in enumerate(told) if values[i] != usual]
    if odd:
      found[name] = odd
  return found


def called(number: int, host: str) -> str:
  return f"{host} (process {number})"


def _explicit() -> dict:
  """What the BIGTRAIN variables say, as arguments of jax."""
  least = {SETTINGS[1]: 1, SETTINGS[2]: 0}
  numbers = [_whole(name, n) for name, n in least.items() if os.environ.get(name)]
  if missing := [name for name in SETTINGS if not os.environ.get(name)]:
    raise Refused(
      f"{' and '.join(missing)} must be set too: {', '.join(SETTINGS)} are host:port of process 0, "
      "how many processes there are, and which one this is, from 0; unset all for a single process"
    )
  coordinator, (count, number) = os.environ[SETTINGS[0]], numbers
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise Refused(
      f"BIGTRAIN_COORDINATOR is {coordinator!r}; give host:port of process 0, as in 10.0.0.1:8476"
    )
  if number >= count:
    raise Refused(
      f"BIGTRAIN_PROCESS is {number} but BIGTRAIN_PROCESSES is {count}: number them from 0 to "
      f"{count - 1}"
    )
  return {"coordinator_address": coordinator, "num_processes": count, "process_id": number}


def _whole(name: str, least: int = 0) -> int:
  value = os.environ[name]
  if not value.isdecimal() or int(value) < least:
    raise Refused(f"{name} is {value!r}; give a whole number from {least} on")
  return int(value)


def _launcher() -> str | None:
  """The variable or the service by which a launcher says that there are several processes.

  In jax's order of detection: the first launcher that is present decides.
  """
  if "OMPI_COMM_WORLD_SIZE" in os.environ:
    return "OMPI_COMM_WORLD_SIZE" if _whole("OMPI_COMM_WORLD_SIZE", 1) > 1 else None
  # A batch script without srun has SLURM_NTASKS too, but is one process and no step.
  if "SLURM_STEP_NODELIST" in os.environ:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    return name if os.environ.get(name) and _whole(name, 1) > 1 else None
  if os.environ.get("MEGASCALE_NUM_SLICES") and _whole("MEGASCALE_NUM_SLICES") > 1:
    return "MEGASCALE_NUM_SLICES"
  for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
    if name in os.environ:
      return name if "," in os.environ[name] else None
  if "TPU_SKIP_MDS_QUERY" not in os.environ and _tpu_attached() and "," in _tpu_workers():
    return "the TPU's metadata server"
  if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
    return "JOB_COMPLETION_INDEX"
  return None


def _has_host() -> bool:
  """Whether this is the only process that SLURM or Open MPI started on its host.

  It then takes all devices there, unless JAX_LOCAL_DEVICE_IDS says which.
  """
  if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
    return False
  if "OMPI_COMM_WORLD_SIZE" in os.environ:
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS")
  return tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES")


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
  except OSError:  # No such server, no such attribute, or no answer.
    return ""


def _join(announced: str, **settings) -> None:
  """Initialises jax.distributed as `announced` says, in a thread that can be left waiting.

  When its own timeout passes, jax ends the process by a signal; so that one is never reached.
  """
  timeout = _whole("BIGTRAIN_TIMEOUT", 1) if os.environ.get("BIGTRAIN_TIMEOUT") else TIMEOUT
  errors = []

  def connect():
    try:
      jax.distributed.initialize(initialization_timeout=timeout + 86_400, **settings)
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=connect, name="join the other processes", daemon=True)
  thread.start()
  with within("join"):
    thread.join(timeout)
  if late := thread.is_alive():
    cause = f"not all of them were there within {timeout} s (BIGTRAIN_TIMEOUT)"
  elif errors:
    cause = str(errors[0]).strip().split("\n")[0]
  else:
    return
  kind = Late if late else Refused  # Who comes too late may be there when all are started again.
  raise kind(
    f"{announced} announces several processes, but they did not come together: {cause}; check that "
    f"all run and that process 0 is reachable, set {', '.join(SETTINGS)} yourself, or only "
    "BIGTRAIN_PROCESSES=1 to run alone"
  ) from next(iter(errors), None)
