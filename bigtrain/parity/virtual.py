"""Virtual devices on this machine's CPU, of this process or of several that share them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np

from bigtrain import processes
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.mesh import Mesh
from bigtrain.parity.shrink import size


@contextlib.contextmanager
def joined(count: int, arguments: list[str]) -> Iterator[None]:
  """Joins so many processes, of which the first starts the others by the same `arguments`.

  In the end it waits for them, or, where it failed, ends them. Nothing is to be printed within.
  """
  if count == 1:
    yield
    return
  others = []
  if "BIGTRAIN_PROCESS" not in os.environ:
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    settings = dict(zip(processes.SETTINGS, (coordinator, str(count), "0"), strict=True))
    os.environ |= settings
    command = [sys.executable, "-m", "bigtrain.cli", "parity", *arguments]
    for i in range(1, count):
      environment = os.environ | {"BIGTRAIN_PROCESS": str(i)}
      others.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
  sys.stdout.flush()
  out = os.dup(1)
  os.dup2(2, 1)  # Gloo prints all that it connects.
  try:
    processes.initialize()
    refused = None
    try:
      yield
    except Refused as error:  # As all do; the first one says it.
      refused = error if others else SystemExit(Exit.REFUSED)
    jax.distributed.shutdown()  # It waits for the others, who do the same.
    if refused is not None:
      raise refused
  except BaseException:
    for other in others:
      other.kill()
    raise
  finally:
    for other in others:
      other.wait()
    os.dup2(out, 1)
    os.close(out)


def over_devices(mesh: Mesh, count: int) -> jax.sharding.Mesh:
  """The mesh over virtual devices of so many processes, whatever else is attached.

  Of two processes neighbours are different ones along every axis.

  Raises:
    Refused: jax has begun already, with fewer.
  """
  n = size(mesh)
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(n // count, 1))  # Of a mesh of one, to refuse it.
  except RuntimeError:  # It has begun.
    pass
  found = jax.devices("cpu")
  if len(found) < n:
    raise Refused(
      f"parity wants {n} virtual devices, but the experiment file made jax begin with "
      f"{len(found)} while it was read; move what computes there into functions, or set "
      f"JAX_NUM_CPU_DEVICES={n}"
    )
  own = [iter([d for d in found if d.process_index == i]) for i in range(count)]
  owner = np.indices([*mesh.shape(n).values()]).sum(0) % count
  return mesh.make([next(own[i]) for i in owner.flat])
