"""First weights from elsewhere: another run's, or a file's, for all of a model or a part of it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bigtrain import leaves, saved
from bigtrain.config import Refused, listed, nearest
from bigtrain.interop import huggingface
from bigtrain.load import near_weights
from bigtrain.run_directory import RunDirectory
from bigtrain.state import State

SUFFIX = ".safetensors"  # Of a file of weights; all else is a run directory.
IsNew = Callable[[str], bool]  # Of a parameter's name.


def check_source(source: str) -> None:
  """Refuses a source of weights that is not there or is none."""
  place = RunDirectory(source, writes=False)
  if not place.path.exists():
    kind = "file" if source.endswith(SUFFIX) else "directory"
    raise Refused(f"weights_from: there is no {kind} {source}{near_weights(source, SUFFIX)}")
  if not source.endswith(SUFFIX):
    saved.newest_of(place.checkpoints)


def load(
  source: str, fresh: State, new: Sequence[str], tokenizer_json: str | None = None
) -> tuple[dict[str, Any], list[str]]:
  """The weights of `source` for the model of `fresh`, sharded as those.

  Of a run these are the weights that were trained, not their average.

  Args:
    source: a run directory, or the path of a .safetensors file.
    fresh: the state that would begin without them.
    new: beginnings of the names of parameters that stay as they are in `fresh`.
    tokenizer_json: of the data that will be trained on, to compare with that of the run.

  Returns:
    The fields `model` and `variables` of the state, and what people should know of them.

  Raises:
    Refused: a parameter is not there or of another shape, or `new` names none.
  """
  part = {"model": fresh.model, "variables": fresh.variables}
  names = [_of_module(name) for name in leaves.flatten(part)]
  for start in new:
    if not any(name.startswith(start) for name in names):
      raise Refused(f"new_weights: the model has no {start}{nearest(start, names)}")
  is_new = lambda name: name.startswith(tuple(new))
  read = _of_file if source.endswith(SUFFIX) else _of_run
  part, unused = read(source, part, is_new)
  told = {"begin fresh": list(filter(is_new, names)), "of it left out": unused}
  lines = [f"weights_from {source}: {listed(v)} {k}" for k, v in told.items() if v]
  return part, lines + _other_tokenizer(source, tokenizer_json)


def _of_run(source: str, part: dict[str, Any], is_new: IsNew) -> tuple[dict[str, Any], list[str]]:
  flat = leaves.flatten(part)
  wanted = {name: leaf for name, leaf in flat.items() if not is_new(_of_module(name))}
  checkpoints, step = saved.newest_of(RunDirectory(source, writes=False).checkpoints)
  have = {name: of for name, of in checkpoints.leaves(step).items() if name.split(".")[0] in part}
  found = checkpoints.restore(step, {k: _as_saved(x, have.get(k, "")) for k, x in wanted.items()})
  found = {name: x.astype(wanted[name].dtype) for name, x in found.items()}
  unused = [_of_module(name) for name in have if name not in wanted]
  return leaves.unflatten(flat | found, part), unused


def _as_saved(leaf, saved: str) -> jax.ShapeDtypeStruct:
  """What to restore for a leaf; of weights, in the dtype in which the other run kept them."""
  kept = {"float32", "bfloat16"}
  dtype = saved.partition("[")[0] if leaf.dtype.name in kept else leaf.dtype
  dtype = dtype if dtype in kept else leaf.dtype
  return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _other_tokenizer(source: str, mine: str | None) -> list[str]:
  """What to know if the run had another tokenizer, whose numbers stand for other tokens."""
  kept = RunDirectory(source, writes=False).tokenizer
  if mine is None or source.endswith(SUFFIX) or not kept.exists():
    return []
  if json.loads(kept.read_text()) == json.loads(mine):
    return []
  return [
    f"weights_from {source}: it was trained with another tokenizer, whose numbers stand for other "
    f"tokens; take TokenizerFile(path='{kept}')"
  ]


def _of_file(source: str, part: dict[str, Any], is_new: IsNew) -> tuple[dict[str, Any], list[str]]:
  model, unused = huggingface.load_some(part["model"], huggingface.read(source), is_new)
  place = lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding)
  return part | {"model": jax.tree.map(place, model, part["model"])}, unused


def _of_module(name: str) -> str:
  """A parameter's name within its module: that in a state without its first word."""
  return name.partition(".")[2]
