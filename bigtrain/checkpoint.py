"""Checkpoints: one item with everything that decides the future of a run. They are saved and kept.

    checkpoints/  120/  a finished save     130.orbax-checkpoint-tmp/  one that is being written
                  damaged/110/  one that was found not to be what was saved

Orbax writes in the background, beside the place, and renames when all is durable: a killed save
leaves no checkpoint. What was written is then read back and compared with the digests that were
made on the devices before (written.py), and only then is the save committed and an older one
removed. One that a kill kept from that is committed when it was restored, which compares all of it
(saved.py).
"""

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from bigtrain import config, digest, files, leaves, processes, saved, written
from bigtrain.background import Background
from bigtrain.config import Refused
from bigtrain.experiment import Checkpoints, Experiment
from bigtrain.saved import Damaged, Saved

DAMAGED = "damaged"  # Where what is not what was saved is set aside.
GONE = ".deleted"
# Orbax reckons its limits by the wall clock, which may be set; a save is limited in `Background`.
NEVER = 10 * 365 * 86400  # Seconds.


class SaveFailed(OSError):
  """A checkpoint could not be written. Those before it are whole."""


class NothingWhole(Refused):
  """Of what a run saved nothing is whole."""


class Store(Saved):
  """The checkpoints of a run that trains, saved in the background.

  A context that ends when they are durable and verified.

  Args:
    path: their directory.
    keep: what is kept.
  """

  def __init__(self, path: epath.Path, keep: Checkpoints):
    super().__init__(path)
    self._keep = keep
    self._writer: ocp.AsyncCheckpointer | None = None
    self._saving: Background | None = None  # A save whose end nobody has seen.
    self.begun: int | None = None  # The step of the last save that was begun.
    self._next: tuple[int, dict[str, Any]] | None = None  # Waits for its save.
    self._keeping = threading.Lock()
    self._news: list[dict[str, Any]] = []
    self._by_first(self._clear)

  def _by_first(self, work: Callable[[], None]) -> None:
    """Has the first process do what is to be done once; all hear of it if that fails."""
    with processes.together(f"the checkpoints in {self.path}"):
      if processes.is_first():
        work()

  def _clear(self) -> None:
    """Removes what was left by what was killed.

    A local directory is locked by its run. A bucket cannot be: there it may be what another run is
    just saving, which lasts `within` seconds at most.
    """
    self.path.mkdir(parents=True, exist_ok=True)
    for place in self.path.glob("*"):
      if _is_unfinished(place) and time.time() - _written(place) > self._keep.within:
        place.rmtree()

  def news(self) -> list[dict[str, Any]]:
    """The events of saves that ended since this was asked last."""
    return [self._news.pop(0) for _ in range(len(self._news))]

  def save(self, step: int, state, experiment: Experiment) -> None:
    """Begins to save. The arrays are copied before this returns, so they may then be donated.

    Raises:
      SaveFailed: this save or the one before it.
    """
    self.wait()
    keep, flat, started = self._keep, leaves.flatten(state), time.monotonic()
    digests = digest.of_arrays(flat)
    about = {"format": saved.FORMAT, "config": config.dump(experiment), "digests": digests}
    self.begun = step
    with self._failing():
      if "://" in str(self.path):  # Else nothing is left of a save of this step (`_clear`).
        self._by_first(lambda: self._clear_for(step))
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
        for old in superseded(self.steps(), self.committed(), keep):
          _remove(self.path / str(old))

    self._saving = Background(finish, keep.within)

  def keep_next(self, step: int, values: dict[str, Any]) -> None:
    """Keeps with the save of `step` what the step behind it gave: now, or when it is verified."""
    if processes.is_first():
      with self._keeping:
        self._next = step, values
      self._keep_next()

  def _keep_next(self) -> None:
    with self._keeping:  # The thread of a save comes here too.
      if self._next is None or not (place := self.path / str(self._next[0])).exists():
        return
      files.replace_json(place / saved.NEXT, self._next[1])
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

  def committed(self) -> list[int]:
    """The steps whose saves were found to be what was to be saved, in order."""
    return [step for step in self.steps() if written.is_committed(self.path / str(step))]

  def newest(
    self, like, told: Callable[[int, str], None], *, until: int | None = None
  ) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole, and its step; None if there is none.

    With `until` it is of that step at most, and those behind it are then removed: the run takes
    another course.

    What is damaged is set aside, under damaged/; `told` hears of which step, and why. All processes
    take part, and take the same.

    Raises:
      NothingWhole: none up to `until` is, but there are later ones, which stay.
      Refused, OSError: as `restore` does.
    """
    self.wait()
    steps = self.agreed_steps()
    for step in reversed([step for step in steps if until is None or step <= until]):
      try:
        state = self.restore(step, like)
      except Damaged as error:
        told(step, f"checkpoint {self.path / str(step)} cannot be read: {error.cause}")
        self._by_first(functools.partial(self._set_aside, step))
        continue
      later = [s for s in steps if until is not None and s > until]
      self._by_first(functools.partial(self._go_on, step, later))
      return step, state
    if until is not None and steps and steps[-1] > until:
      raise NothingWhole(
        f"no checkpoint in {self.path} up to step {until} is whole, to go back to; later ones stay"
      )
    return None

  def _go_on(self, step: int, later: list[int]) -> None:
    """Commits what was restored, and so compared with its digests; removes what has no future."""
    place = self.path / str(step)
    # Nothing of format 1 was compared.
    if not written.is_committed(place) and not (place / saved.ITEM).exists():
      written.mark(place)
    for left in later:
      _remove(self.path / str(left))

  def _clear_for(self, step: int) -> None:
    for place in self.path.glob(f"{step}*"):
      if place.name.partition(".")[0] == str(step) and _is_unfinished(place):
        place.rmtree()

  def _set_aside(self, step: int) -> None:
    place = self.path / DAMAGED / str(step)
    place.parent.mkdir(exist_ok=True)
    while place.exists():  # That step was saved, and damaged, before.
      place = place.with_name(f"{place.name}-again")
    (self.path / str(step)).rename(place)

  @contextlib.contextmanager
  def _failing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      kept: list[int] = []
      with contextlib.suppress(OSError):
        kept = [s for s in self.committed() if s != self.begun]
      raise SaveFailed(
        f"a checkpoint could not be saved in {self.path}: {_shortened(saved.words(error))}; "
        f"{f'that of step {kept[-1]} is whole' if kept else 'no earlier one is known to be whole'}"
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


def superseded(steps: list[int], committed: list[int], keep: Checkpoints) -> list[int]:
  """Which of the saved steps need not be kept: those behind which enough were committed."""
  for_ever = lambda step: keep.keep_every and step % keep.keep_every == 0
  if len(committed) < keep.keep:
    return []
  return [step for step in steps if step < committed[-keep.keep] and not for_ever(step)]


def _is_unfinished(place: epath.Path) -> bool:
  """Whether a save or a removal has begun there and not ended."""
  if place.name == DAMAGED:  # On a bucket it looks like one.
    return False
  return place.suffix == GONE or ocp.utils.is_tmp_checkpoint(place)


def _written(place: epath.Path) -> float:
  """When what is on a bucket was written last, in seconds since the epoch; else long ago."""
  times = [path.stat().mtime for path in place.glob("*")] if "://" in str(place) else []
  return max(times, default=float("-inf"))


def _remove(place: epath.Path) -> None:
  if "://" not in str(place):  # A kill must not leave half of it.
    place = place.rename(place.with_name(place.name + GONE))
  place.rmtree()


def _shortened(cause: str) -> str:
  """The system's word for what went wrong comes last, behind long paths and before a long spec."""
  cause = re.sub(r" \[tensorstore_spec='.*?'\]", "", cause)
  return cause if len(cause) <= 500 else f"{cause[:200]} ... {cause[-295:]}"
