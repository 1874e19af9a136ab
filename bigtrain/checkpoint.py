"""Checkpoints: one item with everything that decides the future of a run, restored onto any mesh.

    checkpoints/  120/  a finished save     130.orbax-checkpoint-tmp/  one that is being written
                  damaged/110/  one that was found not to be what was saved

State is stored as a flat dict from a leaf's path to its array, so that a checkpoint does not depend
on the classes that held it, and a leaf that is missing is named. The item's metadata holds the
format version, the resolved config, and a digest of every chunk of every array, made on the devices
before anything was written (digest.py).

Orbax writes in the background, beside the place, and renames when all is durable: a killed save
leaves no checkpoint. What was written is then read back and compared with the digests (written.py),
and only then is the save committed and an older one removed. Whatever is restored is compared with
the digests again, on the devices.
"""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bigtrain import config, digest, files, leaves, processes, written
from bigtrain.background import Background
from bigtrain.config import Refused, listed, nearest
from bigtrain.experiment import Checkpoints, Experiment
from bigtrain.failures import OUT_OF_MEMORY
from bigtrain.hints import either

FORMAT = 2  # Raise it when an older version could not read what is written now.
ITEM = "default"  # Where in the directory of a step format 1 had its arrays.
DAMAGED = "damaged"  # Where what cannot be read is set aside.
NEXT = "next.json"
GONE = ".deleted"
# Orbax reckons its limits by the wall clock, which may be set; a save is limited in `Background`.
NEVER = 10 * 365 * 86400  # Seconds.
FRESH = "statistics."  # Leaves that begin as zeros where an older version did not save them.

# Orbax logs, with its traceback, what it also raises, and that a reader only reads.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class SaveFailed(OSError):
  """A checkpoint could not be written. Those before it are whole."""


class Damaged(Refused):
  """A checkpoint cannot be read, or is not what was saved."""

  def __init__(self, place: epath.Path, cause: str, earlier: list[int]):
    self.cause = cause
    then = (
      f"go on from that of step {earlier[-1]}" if earlier else "begin anew: there is no earlier"
    )
    super().__init__(
      f"checkpoint {place} cannot be read: {cause}; if it is damaged, remove that directory to "
      f"{then}"
    )


class NothingWhole(Refused):
  """Of what a run saved nothing is whole."""


class Store:
  """The checkpoints of one run, saved in the background; a context that ends when they are durable.

  Args:
    path: their directory.
    keep: what is kept; None to read only.
  """

  def __init__(self, path: epath.Path, keep: Checkpoints | None = None):
    self.path, self._keep = path, keep
    self._reader = ocp.PyTreeCheckpointHandler()
    self._writer: ocp.AsyncCheckpointer | None = None
    self._saving: Background | None = None  # A save whose end nobody has seen.
    self.begun: int | None = None  # The step of the last save that was begun.
    self._next: tuple[int, dict[str, Any]] | None = None  # Waits for its save.
    self._keeping = threading.Lock()
    self._news: list[dict[str, Any]] = []
    if keep is not None and processes.is_first():
      path.mkdir(parents=True, exist_ok=True)
      for left in path.glob("*"):  # By what was killed.
        if ocp.utils.is_tmp_checkpoint(left) or left.suffix == GONE:
          left.rmtree()

  def steps(self) -> list[int]:
    """The steps that were saved, in order."""
    return saved(self.path)

  def news(self) -> list[dict[str, Any]]:
    """The events of saves that ended since this was asked last."""
    return [self._news.pop(0) for _ in range(len(self._news))]

  def save(self, step: int, state, experiment: Experiment) -> None:
    """Begins to save. The arrays are copied before this returns, so they may then be donated.

    Raises:
      SaveFailed: this save or the one before it.
    """
    assert self._keep is not None, "this store was opened to read"
    self.wait()
    keep, flat, started = self._keep, leaves.flatten(state), time.monotonic()
    digests = digest.of_arrays(flat)
    about = {"format": FORMAT, "config": config.dump(experiment), "digests": digests}
    self.begun = step
    with self._failing():
      if self._writer is None:
        handler = ocp.PyTreeCheckpointHandler()
        self._writer = ocp.AsyncCheckpointer(handler, timeout_secs=NEVER)
      args = ocp.args.PyTreeSave(flat, custom_metadata=about)
      self._writer.save(self.path / str(step), args=args)
    writer = self._writer

    def finish():
      writer.wait_until_finished()
      durable = time.monotonic()
      arrays = written.commit(self.path / str(step), digests, keep.verify, keep.within)
      seconds = {"write_seconds": durable - started, "seconds": time.monotonic() - durable}
      rounded = {name: round(value, 3) for name, value in seconds.items()}
      self._news.append({"name": "verified", "step": step, "arrays": arrays, **rounded})
      if processes.is_first():
        self._keep_next()
        for old in superseded(self.steps(), keep):
          _remove(self.path / str(old))

    self._saving = Background(finish, keep.within)

  def keep_next(self, step: int, values: dict[str, Any]) -> None:
    """Keeps with the save of `step` what the step behind it gave: now, or when it is verified."""
    if processes.is_first():
      with self._keeping:
        self._next = step, values
      self._keep_next()

  def next_step(self, step: int) -> dict[str, Any] | None:
    """What `keep_next` kept with that save; None if that was nothing, {} if it is damaged."""
    path = self.path / str(step) / NEXT
    return (files.read_json(path) or {}) if path.exists() else None

  def _keep_next(self) -> None:
    with self._keeping:  # The thread of a save comes here too.
      if self._next is None or not (place := self.path / str(self._next[0])).exists():
        return
      files.replace_json(place / NEXT, self._next[1])
      self._next = None

  def check(self) -> None:
    """Raises SaveFailed if a save in the background failed or takes too long; does not wait."""
    if self._saving is not None and self._saving.is_over():
      self.wait()

  def wait(self) -> None:
    """Returns when the save is verified; raises SaveFailed if it is not, or takes too long."""
    if self._saving is not None:
      saving, self._saving = self._saving, None
      with self._failing():
        try:
          saving.result()
        except TimeoutError:
          self._writer = None  # To close it would be to wait for what hangs.
          raise

  def leaves(self, step: int) -> dict[str, str]:
    """What was saved, by its path: as in {"model.up_DF": "float32[64,16]"}.

    Raises:
      Refused: a newer version wrote it.
      Damaged: it cannot be read.
    """
    return {name: leaves.shown(leaf) for name, leaf in self._metadata(step)[0].items()}

  def _metadata(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the arrays by name, and what was saved beside them."""
    with self._reading(step):
      metadata = self._reader.metadata(self._item(step))
      about = metadata.custom_metadata or {}
      version = about["format"]
    if version > FORMAT:
      raise Refused(
        f"checkpoint {self.path / str(step)} has format {version}, and this version of bigtrain "
        f"reads up to {FORMAT}: install a newer one"
      )
    return metadata.tree, about

  def _item(self, step: int) -> epath.Path:
    place = self.path / str(step)
    return place / ITEM if (place / ITEM).exists() else place

  def restore(self, step: int, like):
    """The tree of `like`: its shapes and shardings, whatever mesh wrote the checkpoint.

    All processes take part.

    Args:
      step: one that was saved.
      like: a tree of jax.ShapeDtypeStruct, with shardings or for one device; a part of a State,
        as in {"model": ...}, will do.

    Raises:
      Refused: a newer version wrote it, or a leaf is missing or has another shape or dtype.
      Damaged: it cannot be read, or what is read is not what was saved.
    """
    with self._reading(step, together=True):
      arrays, about = self._metadata(step)
    have = {name: leaves.shown(leaf) for name, leaf in arrays.items()}
    want = {name: leaves.placed(leaf) for name, leaf in leaves.flatten(like).items()}
    fresh = {n: want.pop(n) for n in list(want) if n.startswith(FRESH) and n not in have}
    leaves.check(self.path / str(step), want, have)
    args = ocp.args.PyTreeRestore(
      item=want,
      restore_args=ocp.checkpoint_utils.construct_restore_args(want),
      partial_restore=True,
    )
    with self._reading(step, together=True):
      found = self._reader.restore(self._item(step), args=args)
    saved = about.get("digests", {})  # Format 1 has none.
    with self._reading(step, together=True):
      now = digest.of_arrays({name: found[name] for name in want if name in saved})
      if wrong := [name for name in now if now[name] != saved[name]]:
        raise OSError(f"{listed(wrong)} are not what was saved")
    begun = {
      name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for name, x in fresh.items()
    }
    return leaves.unflatten(found | begun, like)

  def newest(
    self, like, told: Callable[[int, str], None], *, until: int | None = None
  ) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole, and its step; None if nothing was ever saved here.

    With `until` those of later steps are removed first: the run takes another course.

    What is damaged is set aside, under damaged/; `told` hears of which step, and why. All processes
    take part.

    Raises:
      NothingWhole: of what was saved nothing is whole.
      Refused: as `restore` does.
    """
    self.wait()
    if until is not None:
      for step in self.steps() if processes.is_first() else ():
        if step > until:
          _remove(self.path / str(step))
      processes.agree(until=until)
    for step in reversed(self.steps()):
      try:
        return step, self.restore(step, like)
      except Damaged as error:
        told(step, f"checkpoint {self.path / str(step)} cannot be read: {error.cause}")
        if processes.is_first():
          self._set_aside(step)
        processes.agree(step=step)
    if (self.path / DAMAGED).exists():
      raise NothingWhole(
        f"no checkpoint in {self.path} is whole, and damaged ones are in {self.path / DAMAGED}: "
        f"put one back, or begin again at step 0: {either('restart', 'restart=True')}"
      )
    return None

  def _set_aside(self, step: int) -> None:
    place = self.path / DAMAGED / str(step)
    place.parent.mkdir(exist_ok=True)
    while place.exists():  # That step was saved, and damaged, before.
      place = place.with_name(f"{place.name}-again")
    (self.path / str(step)).rename(place)

  @contextlib.contextmanager
  def _reading(self, step: int, *, together: bool = False) -> Iterator[None]:
    """Says what was being read, and fails on all processes if it fails on one of them."""
    failed, cause = None, ""
    try:
      yield
    except Refused as error:
      if not isinstance(error, Damaged):
        raise
      failed, cause = error, error.cause
    except Exception as error:
      if OUT_OF_MEMORY in str(error):
        raise
      failed, cause = error, str(error).strip().split("\n")[0][:150]
    if together:
      cause = processes.any_said(cause)
    if cause:
      raise Damaged(self.path / str(step), cause, [s for s in self.steps() if s < step]) from failed

  @contextlib.contextmanager
  def _failing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      cause = str(error).strip().split("\n")[0]
      kept = [s for s in self.steps() if s != self.begun]
      raise SaveFailed(
        f"a checkpoint could not be saved in {self.path}: {_shortened(cause)}; "
        f"{f'that of step {kept[-1]} is whole' if kept else 'there is no earlier one'}"
      ) from error

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      self.wait()
    # Else it failed, of which the error tells, or is an interrupt, which waits for nothing.
    if self._writer is not None and (kind is None or issubclass(kind, Exception)):
      with contextlib.suppress(Exception):
        self._writer.close()


def saved(path: epath.Path) -> list[int]:
  """The steps of which there is a finished save, in order."""
  found = [place for place in path.glob("*") if place.name.isdecimal()]
  return sorted(int(place.name) for place in found if ocp.utils.is_checkpoint_finalized(place))


def superseded(steps: list[int], keep: Checkpoints) -> list[int]:
  """Which of the saved steps need not be kept, where the newest of them is verified."""
  for_ever = lambda step: keep.keep_every and step % keep.keep_every == 0
  return [step for step in steps[: -keep.keep] if not for_ever(step)]


def _remove(place: epath.Path) -> None:
  if "://" not in str(place):  # A kill must not leave half of it.
    place = place.rename(place.with_name(place.name + GONE))
  place.rmtree()


def _shortened(cause: str) -> str:
  """The system's word for what went wrong comes last, behind long paths and before a long spec."""
  cause = re.sub(r" \[tensorstore_spec='.*?'\]", "", cause)
  return cause if len(cause) <= 500 else f"{cause[:200]} ... {cause[-295:]}"


def newest(path: epath.Path, like, step: int | None = None):
  """What `like` asks for of a run's newest checkpoint, or of that after `step`.

  Raises:
    Refused: there is no such checkpoint, or it does not hold that.
  """
  with newest_of(path, step) as (store, found):
    return store.restore(found, like)


@contextlib.contextmanager
def newest_of(path: epath.Path, step: int | None = None) -> Iterator[tuple[Store, int]]:
  """A run's checkpoints and the newest step that was saved, or `step`; refused if there is none."""
  if not path.exists():
    raise Refused(f"{path.parent} has no checkpoint")
  with Store(path) as store:
    steps = store.steps()
    if not steps or step not in (None, *steps):
      raise Refused(
        f"{path.parent} has no checkpoint{'' if step is None else f' of step {step}'}"
        f"{nearest(str(step), map(str, steps))}"
      )
    yield store, steps[-1] if step is None else step
