"""Checkpoints: one item with everything that decides the future of a run, restored onto any mesh.

State is stored as a flat dict from a leaf's path to its array, so that a checkpoint does not depend
on the classes that held it, and a leaf that is missing is named. The item's metadata holds the
format version and the resolved config. Orbax writes in the background, beside the place, and
renames when all is durable: a killed save leaves no checkpoint, and the next start removes what it
wrote.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from bigtrain import config
from bigtrain.config import Refused, nearest
from bigtrain.experiment import Checkpoints, Experiment
from bigtrain.failures import OUT_OF_MEMORY

FORMAT = 1  # Raise it when an older version could not read what is written now.

# Orbax logs, with its traceback, what it also raises, and that a reader only reads.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class SaveFailed(OSError):
  """A checkpoint could not be written. Those before it are whole."""


def flatten(tree) -> dict[str, Any]:
  """Leaves by path: {"model.transformer.segments.0.0.attention.q_DKGH": array, ...}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  flat = {path_name(path): leaf for path, leaf in leaves}
  assert len(flat) == len(leaves), "two leaves have one path"
  return flat


def path_name(path) -> str:
  """A key path as dotted words; the `.value` of an NNX variable is left out."""
  words = re.findall(r"\w+", jax.tree_util.keystr(path))
  return ".".join(words[:-1] if words[-1] == "value" else words)


def unflatten(flat: Mapping[str, Any], like):
  """The tree of `like` with the leaves of `flat`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_name(path)], like)


class Store:
  """The checkpoints of one run, saved in the background; a context that ends when they are durable.

  Args:
    path: their directory.
    keep: what is kept; None to read only.
  """

  def __init__(self, path: epath.Path, keep: Checkpoints | None = None):
    policies: list[Any] = [preservation_policy.LatestN(keep.keep if keep else None)]
    if keep and keep.keep_every:
      policies.append(preservation_policy.EveryNSteps(keep.keep_every))
    self.path = path
    self._unchecked = False  # A save was begun whose end nobody has seen.
    self._manager = ocp.CheckpointManager(
      path,
      item_handlers=ocp.PyTreeCheckpointHandler(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        read_only=keep is None,
        create=keep is not None,
        cleanup_tmp_directories=keep is not None,
      ),
    )

  def steps(self) -> list[int]:
    """The steps that were saved, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, experiment: Experiment) -> None:
    """Begins to save. The arrays are copied before this returns, so they may then be donated.

    Raises:
      SaveFailed: this save or the one before it.
    """
    about = {"format": FORMAT, "config": config.dump(experiment)}
    args = ocp.args.PyTreeSave(flatten(state), custom_metadata=about)
    self._unchecked = True
    self._saving(lambda: self._manager.save(step, args=args, force=True))

  def check(self) -> None:
    """Raises SaveFailed if a save in the background has failed; does not wait."""
    if self._unchecked and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when what was saved is durable; raises SaveFailed if it could not be."""
    self._unchecked = False
    self._saving(self._manager.wait_until_finished)

  def leaves(self, step: int) -> dict[str, str]:
    """What was saved, by its path: as in {"model.up_DF": "float32[64,16]"}.

    Raises:
      Refused: a newer version wrote it, or it cannot be read.
    """
    with self._reading(step):
      metadata = self._manager.item_metadata(step)
      version = metadata.custom_metadata["format"]
      have = {name: _shape(leaf) for name, leaf in metadata.tree.items()}
    if version > FORMAT:
      raise Refused(
        f"checkpoint {self.path / str(step)} has format {version}, and this version of bigtrain "
        f"reads up to {FORMAT}: install a newer one"
      )
    return have

  def restore(self, step: int, like):
    """The tree of `like`: its shapes and shardings, whatever mesh wrote the checkpoint.

    Args:
      step: one that was saved.
      like: a tree of jax.ShapeDtypeStruct, with shardings or for one device; a part of a State,
        as in {"model": ...}, will do.

    Raises:
      Refused: a newer version wrote it, or a leaf is missing or has another shape or dtype.
    """
    want, have, at = flatten(like), self.leaves(step), f"checkpoint {self.path / str(step)}"
    remedy = (
      "it is of another model or optimizer: undo that change, or begin without this checkpoint "
      "(another run directory, no weights_from, or new_weights for what shall begin fresh)"
    )
    for name, leaf in want.items():
      if name not in have:
        raise Refused(f"{at} has no {name}{nearest(name, have)}; {remedy}")
      if have[name] != _shape(leaf):
        raise Refused(f"{at} has {name} as {have[name]}, not {_shape(leaf)}; {remedy}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here)
    want = jax.tree.map(place, want)
    args = ocp.args.PyTreeRestore(
      item=want,
      restore_args=ocp.checkpoint_utils.construct_restore_args(want),
      partial_restore=True,
    )
    with self._reading(step):
      return unflatten(self._manager.restore(step, args=args), like)

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      if OUT_OF_MEMORY in str(error):
        raise
      cause = str(error).strip().split("\n")[0][:150]
      earlier = [other for other in self.steps() if other < step]
      then = (
        f"go on from that of step {earlier[-1]}" if earlier else "begin anew: there is no earlier"
      )
      raise Refused(
        f"checkpoint {self.path / str(step)} cannot be read: {cause}; if it is damaged, remove "
        f"that directory to {then}"
      ) from error

  def _saving(self, run) -> None:
    try:
      run()
    except Exception as error:
      self._manager.reload()
      cause, kept = str(error).strip().split("\n")[0], self.steps()
      raise SaveFailed(
        f"a checkpoint could not be saved in {self.path}: {_shortened(cause)}; "
        f"{f'that of step {kept[-1]} is whole' if kept else 'there is no earlier one'}"
      ) from error

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is None:
      self.wait()
    if kind is None or issubclass(kind, Exception):  # Else it is an interrupt: waits for nothing.
      with contextlib.suppress(Exception):  # What failed was raised before.
        self._manager.close()


def _shortened(cause: str) -> str:
  """The system's word for what went wrong comes last, behind long paths and before a long spec."""
  cause = re.sub(r" \[tensorstore_spec='.*?'\]", "", cause)
  return cause if len(cause) <= 500 else f"{cause[:200]} ... {cause[-295:]}"


def _shape(leaf) -> str:
  """As in float32[64,16]."""
  return f"{jax.numpy.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


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
