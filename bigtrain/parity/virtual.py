"""Virtual devices on this machine's CPU, of this process or of several that share them."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

from bigtrain import processes
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.failures import explained
from bigtrain.mesh import Mesh
from bigtrain.parity.shrink import size

# What a process ends with that has done its part; all of them refuse what one refuses.
PARTS = (Exit.DONE, Exit.CHECK, Exit.REFUSED)
LAST = 40  # Lines that are shown of what a process that failed has said.
MOMENT = 3.0  # Seconds within which a process that has failed is gone.
# Of XLA's pool for each device, where one is usual: those that wait in collectives leave some.
THREADS = 4


@contextlib.contextmanager
def joined(count: int, arguments: list[str]) -> Iterator[None]:
  """Joins so many processes, of which the first starts the others by the same `arguments`.

  In the end it waits for them, or, where it failed, ends them. Where another one fails, all end
  and the first says why. Nothing is to be printed within.
  """
  if count == 1:
    yield
    return
  others = None if "BIGTRAIN_PROCESS" in os.environ else Others(count, arguments)
  refused = None
  with _prints_to_stderr():
    try:
      processes.initialize()
      try:
        yield
      except Refused as error:  # As all do; the first one says it.
        refused = SystemExit(Exit.REFUSED) if others is None else error
      jax.distributed.shutdown()  # It waits for the others, who do the same.
    except Exception as error:
      if others is not None:
        others.end()
      _fail(error)
    if others is not None:
      others.wait()
  if refused is not None:
    raise refused


class Others:
  """The other processes of this command, each watched by a thread.

  Where one of them fails, the thread says so and ends this process: it may be waiting for that one
  within a collective, where no exception reaches it.
  """

  def __init__(self, count: int, arguments: list[str]):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    os.environ |= dict(zip(processes.SETTINGS, (coordinator, str(count), "0"), strict=True))
    command = [sys.executable, "-m", "bigtrain.cli", "parity", *arguments]
    self._count, self._ended = count, False
    self._processes: list[subprocess.Popen] = []
    self._watches: list[threading.Thread] = []
    for i in range(1, count):
      environment, pipe = os.environ | {"BIGTRAIN_PROCESS": str(i)}, subprocess.PIPE
      self._processes.append(
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=pipe)
      )
      self._watches.append(threading.Thread(target=self._watch, args=(i,), daemon=True))
    for watch in self._watches:
      watch.start()

  def wait(self) -> None:
    for watch in self._watches:
      watch.join()

  def end(self) -> None:
    """Ends them. If one had failed before, that is why this process did, and what is said."""
    for watch in self._watches:
      watch.join(MOMENT)
    self._kill()
    self.wait()

  def _kill(self) -> None:
    self._ended = True
    for process in self._processes:
      process.kill()

  def _watch(self, number: int) -> None:
    process = self._processes[number - 1]
    _, written = process.communicate()
    if self._ended or (code := process.returncode) in PARTS:
      return
    self._kill()
    lines = written.decode(errors="replace").rstrip().splitlines()[-LAST:] or ["(none)"]
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    said = f"process {number} of {self._count} (they count from 0) ended {how}; its last words:"
    cause = lines[-1].removeprefix("bigtrain: ")
    print(*lines, f"bigtrain: {said} {cause}", sep="\n", file=sys.stderr, flush=True)
    os._exit(Exit.FAILED)


def _fail(error: Exception) -> NoReturn:
  """Says why, and ends this process at once: jax, as Python ends, would wait for the others."""
  message, code = explained(error) or (f"{type(error).__name__}: {error}", Exit.FAILED)
  if not explained(error):
    traceback.print_exception(error)
  print(f"bigtrain: {message}", file=sys.stderr, flush=True)
  os._exit(code)


@contextlib.contextmanager
def _prints_to_stderr() -> Iterator[None]:
  """Standard output stays what this command says: Gloo prints all that it connects."""
  sys.stdout.flush()
  out = os.dup(1)
  os.dup2(2, 1)
  try:
    yield
  finally:
    os.dup2(out, 1)
    os.close(out)


def over_devices(mesh: Mesh, count: int) -> jax.sharding.Mesh:
  """The mesh over virtual devices of so many processes, whatever else is attached.

  Of two processes neighbours are different ones along every axis.

  Raises:
    Refused: jax has begun already, with fewer.
  """
  n = size(mesh)
  os.environ.setdefault("NPROC", str(THREADS * n))
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
