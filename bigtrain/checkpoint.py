"""Checkpoints: one item with everything that decides the future of a run, restored onto any mesh.

State is stored as a flat dict from a parameter's path to its array, so that a checkpoint does not
depend on the classes that held it: a path missing on either side is named. Beside it lies a JSON
record with the format version, the data position and the resolved config. Orbax writes in the
background, aside, and renames when all is durable: a killed save leaves no checkpoint.
"""

import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from bigtrain import config
from bigtrain.config import Refused, nearest
from bigtrain.experiment import Checkpoints, Experiment

FORMAT = 1  # Raise it when an older version could not read what is written now.


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


def unflatten(flat: dict[str, Any], like):
  """The tree of `like` with the leaves of `flat`."""
  return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_name(path)], like)


class Store:
  """The checkpoints of one run, saved in the background.

  Args:
    path: their directory.
    keep: what is kept; None to read only.
  """

  def __init__(self, path: epath.Path, keep: Checkpoints | None = None):
    policies: list[Any] = [preservation_policy.LatestN(keep.keep if keep else None)]
    if keep and keep.keep_every:
      policies.append(preservation_policy.EveryNSteps(keep.keep_every))
    self.path = path
    self._manager = ocp.CheckpointManager(
      path,
      item_names=("state", "record"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        read_only=keep is None,
        create=keep is not None,
      ),
    )

  def latest(self) -> int | None:
    """The newest step that was saved."""
    return self._manager.latest_step()

  def save(self, step: int, state, experiment: Experiment) -> None:
    """Begins to save. The arrays are copied before this returns, so they may then be donated."""
    record = {
      "format": FORMAT,
      "step": step,
      "example": int(state.example),
      "config": config.dump(experiment),
    }
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(flatten(state)), record=ocp.args.JsonSave(record)
    )
    self._manager.save(step, args=args, force=True)

  def record(self, step: int) -> dict[str, Any]:
    """What stands beside the state: format, step, example, config."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = self._manager.restore(step, args=args)["record"]
    if record["format"] > FORMAT:
      raise Refused(
        f"{self.path}/{step} has checkpoint format {record['format']}, and this version of bigtrain "
        f"reads up to {FORMAT}: install a newer one"
      )
    return record

  def restore(self, step: int, like):
    """The tree of `like`: its shapes and shardings, whatever mesh wrote the checkpoint.

    Args:
      step: one that was saved.
      like: a tree of jax.ShapeDtypeStruct with shardings; a part of a State will do.

    Raises:
      Refused: a leaf is missing, or has another shape.
    """
    want = flatten(like)
    metadata = self._manager.item_metadata(step)["state"]
    have = {name: tuple(m.shape) for name, m in (getattr(metadata, "tree", metadata)).items()}
    for name, leaf in want.items():
      if name not in have:
        raise Refused(f"checkpoint {self.path}/{step} has no {name}{nearest(name, have)}")
      if have[name] != leaf.shape:
        raise Refused(
          f"checkpoint {self.path}/{step} has {name} of shape {have[name]}, not {leaf.shape}"
        )
    args = ocp.args.PyTreeRestore(
      item=want,
      restore_args=ocp.checkpoint_utils.construct_restore_args(want),
      partial_restore=True,
    )
    flat = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    return unflatten(flat, like)

  def wait(self) -> None:
    """Returns when what was saved is durable; raises what went wrong."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def newest(path: epath.Path, like, step: int | None = None):
  """What `like` asks for of a run's newest checkpoint, or of that after `step`.

  Raises:
    Refused: there is no such checkpoint.
  """
  store = Store(path)
  try:
    if (step := store.latest() if step is None else step) is None:
      raise Refused(f"{path.parent} has no checkpoint yet")
    return store.restore(step, like)
  finally:
    store.close()
