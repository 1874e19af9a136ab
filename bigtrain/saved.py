"""What was saved, read back: onto any mesh, and only as it was when it was saved.

State is stored as a flat dict from a leaf's path to its array, so that a checkpoint does not depend
on the classes that held it, and a leaf that is missing is named. The item's metadata holds the
format version, the resolved config, and the digests of every array (digest.py), with which whatever
is restored is compared, on the devices.

An error in reading is one of two kinds. What lies there cannot be decoded, or is something else:
then the checkpoint is damaged, whenever it is read. Or it can just now not be read, as from storage
that does not answer: that may pass, and says nothing of the checkpoint.
"""

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bigtrain import digest, files, leaves, processes
from bigtrain.config import Refused, listed, nearest
from bigtrain.secrets import redacted

FORMAT = 2  # Raise it when an older version could not read what is written now.
ITEM = "default"  # Where in the directory of a step format 1 had its arrays.
NEXT = "next.json"
FRESH = "statistics."  # Leaves that begin as zeros where an older version did not save them.

# How Python, orbax and tensorstore say that they cannot decode what they have read ...
UNDECODED = (
  ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, EOFError,
  NotImplementedError,
)  # fmt: skip
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# ... and the words with which tensorstore begins what it could not read, a ValueError all the same.
# ("UNKNOWN" is how it has EIO, "ABORTED" ESTALE, "RESOURCE_EXHAUSTED" EMFILE and ENOMEM.)
UNREAD = (
  "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE", "UNKNOWN",
)  # fmt: skip


# Orbax logs, with its traceback, what it also raises, and that a reader only reads.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Damaged(Refused):
  """A checkpoint cannot be decoded, or is not what was saved."""

  def __init__(self, place: epath.Path, cause: str, earlier: list[int]):
    self.cause = cause
    then = (
      f"go on from that of step {earlier[-1]}" if earlier else "begin anew: there is no earlier"
    )
    super().__init__(
      f"checkpoint {place} cannot be read: {cause}; if it is damaged, remove that directory to "
      f"{then}"
    )


class Saved:
  """The checkpoints of a run, to be read.

  Args:
    path: their directory.
  """

  def __init__(self, path: epath.Path):
    self.path = path
    self._reader = ocp.PyTreeCheckpointHandler()

  def steps(self) -> list[int]:
    """The steps that were saved, in order.

    Raises:
      OSError: they can just now not be listed, which must not look as if there were none.
    """
    if "://" in str(self.path) and not self.path.exists():
      return []  # TensorFlow, which may be what reads buckets, has an error of its own for that.
    try:
      found = [place for place in self.path.iterdir() if place.name.isdecimal()]
    except FileNotFoundError:
      return []
    return sorted(int(place.name) for place in found if ocp.utils.is_checkpoint_finalized(place))

  def agreed_steps(self) -> list[int]:
    """The steps as the first process sees them: a shared folder may show others an older list."""
    own: list[int] = []
    with processes.together(f"the checkpoints in {self.path}"):
      if processes.is_first():
        own = self.steps()
    return processes.gather(own)[0]

  def next_step(self, step: int) -> dict[str, Any] | None:
    """What is kept with a save of the step behind it; None if nothing is, {} if it is damaged."""
    path = self.path / str(step) / NEXT
    return (files.read_json(path) or {}) if path.exists() else None

  def leaves(self, step: int) -> dict[str, str]:
    """What was saved, by its path: as in {"model.up_DF": "float32[64,16]"}.

    Raises:
      Refused, Damaged, OSError: as `restore` does.
    """
    with self._reading(step):
      arrays, _ = self._metadata(step)
    return {name: leaves.shown(leaf) for name, leaf in arrays.items()}

  def restore(self, step: int, like):
    """The tree of `like`: its shapes and shardings, whatever mesh wrote the checkpoint.

    All processes take part.

    Args:
      step: one that was saved.
      like: a tree of jax.ShapeDtypeStruct, with shardings or for one device; a part of a State,
        as in {"model": ...}, will do.

    Raises:
      Refused: a newer version wrote it, or a leaf is missing or has another shape or dtype.
      Damaged: it cannot be decoded, or what is read is not what was saved.
      OSError: it can just now not be read, and may be whole.
    """
    with self._reading(step):
      self._wait_for(step)
      arrays, digests = self._metadata(step)
    have = {name: leaves.shown(leaf) for name, leaf in arrays.items()}
    want = {name: leaves.placed(leaf) for name, leaf in leaves.flatten(like).items()}
    fresh = {n: want.pop(n) for n in list(want) if n.startswith(FRESH) and n not in have}
    leaves.check(self.path / str(step), want, have)
    args = ocp.args.PyTreeRestore(
      item=want,
      restore_args=ocp.checkpoint_utils.construct_restore_args(want),
      partial_restore=True,
    )
    with self._reading(step):
      found = self._reader.restore(self._item(step), args=args)
    with self._reading(step):
      if digests is not None:
        if bare := [name for name in want if name not in digests]:
          raise ValueError(f"{listed(bare)} have no digests")
        now = digest.of_arrays({name: found[name] for name in want})
        if wrong := [name for name in now if now[name] != digests[name]]:
          raise ValueError(f"{listed(wrong)} are not what was saved")
    begun = {
      name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for name, x in fresh.items()
    }
    return leaves.unflatten(found | begun, like)

  def _wait_for(self, step: int) -> None:
    """Returns when this process sees what the first one has listed."""
    until = time.monotonic() + files.VISIBLE
    while not processes.is_first() and step not in self.steps():
      if time.monotonic() > until:
        raise OSError("it is not seen here, but by the first process")
      time.sleep(0.5)

  def _metadata(self, step: int) -> tuple[dict[str, Any], dict[str, list[int]] | None]:
    """Of the arrays by name; and their digests, None where format 1 has none."""
    metadata = self._reader.metadata(self._item(step))
    about = metadata.custom_metadata or {}
    if (version := about["format"]) > FORMAT:
      raise Refused(
        f"checkpoint {self.path / str(step)} has format {version}, and this version of bigtrain "
        f"reads up to {FORMAT}: install a newer one"
      )
    return metadata.tree, None if version == 1 else about["digests"]

  def _item(self, step: int) -> epath.Path:
    place = self.path / str(step)
    return place / ITEM if (place / ITEM).exists() else place

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Says what was being read, and fails on all processes if it fails on one of them."""
    failed: Exception | None = None
    try:
      yield
    except Exception as error:
      failed = error
    told = processes.gather(failed and {"damaged": is_damage(failed), "cause": _cause(failed)})
    if not any(told):
      return
    if failed is not None and isinstance(failed, (Refused, jax.errors.JaxRuntimeError)):
      raise failed  # It says all, as does a device whose memory is full.
    at = lambda i: f", in process {i}" if len(told) > 1 else ""
    bad = [(t["damaged"], t["cause"] + at(i)) for i, t in enumerate(told) if t]
    place = self.path / str(step)
    if passing := [cause for damaged, cause in bad if not damaged]:
      raise OSError(f"checkpoint {place} can just now not be read: {passing[0]}") from failed
    raise Damaged(place, bad[0][1], [s for s in self.steps() if s < step]) from failed


def is_damage(error: BaseException) -> bool:
  """Whether an error in reading tells of what lies there, and not of a trouble that may pass."""
  error = _root(error)
  if isinstance(error, OSError):
    return isinstance(error, GONE)
  return isinstance(error, UNDECODED) and str(error).partition(":")[0] not in UNREAD


def words(error: BaseException) -> str:
  """The first line of what an error says, which may be nothing."""
  said = redacted(str(error)).strip()  # Before it is cut: half of a secret would stay.
  return said.split("\n")[0] or type(error).__name__


def _cause(error: BaseException) -> str:
  """Its first words, and the system's, which tensorstore has behind long paths."""
  said = words(_root(error))
  system = re.search(r": ([^:]*) \[os_error_code=", said[150:])
  return said[:150] + (f" ... {system[1]}" if system else "")


def _root(error: BaseException) -> BaseException:
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def newest(path: epath.Path, like, step: int | None = None):
  """What `like` asks for of a run's newest checkpoint, or of that after `step`.

  Raises:
    Refused: there is no such checkpoint, or it does not hold that.
    OSError: it can just now not be read.
  """
  saved, found = newest_of(path, step)
  return saved.restore(found, like)


def newest_of(path: epath.Path, step: int | None = None) -> tuple[Saved, int]:
  """A run's checkpoints and the newest step that was saved, or `step`; refused if there is none.

  All processes take part.
  """
  saved = Saved(path)
  steps = saved.agreed_steps()
  if not steps or step not in (None, *steps):
    raise Refused(
      f"{path.parent} has no checkpoint{'' if step is None else f' of step {step}'}"
      f"{nearest(str(step), map(str, steps))}"
    )
  return saved, steps[-1] if step is None else step
