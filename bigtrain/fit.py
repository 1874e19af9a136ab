"""Whether model, data and objective go together: found by tracing the loss, which takes no data."""

import functools
import sysconfig
import traceback
from pathlib import Path

import jax

from bigtrain import marks, sharding
from bigtrain.config import Refused
from bigtrain.experiment import Data, Experiment

# Whose code is not the user's.
LIBRARIES = (
  Path(__file__).parent,
  *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def check_fit(experiment: Experiment, data: Data) -> None:
  """Refuses an objective that asks its model or its batches for what they do not have.

  What goes wrong in someone's own code is raised as it is: its traceback helps.
  """
  e, place = experiment, sharding.batch_sharding()
  spec = data.stage(0).spec(e.batch)
  batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for k, s in spec.items()}
  try:
    jax.eval_shape(functools.partial(_loss, e), _key(), batch)
  except Refused:
    raise
  except Exception as error:
    if not _is_of_libraries(error):
      raise
    name, model, of = (type(part).__name__ for part in (e.objective, e.model, e.data))
    takes = f"; {name} takes {e.objective.takes}" if e.objective.takes else ""
    raise Refused(
      f"{name} does not go with {model} and {of}: {_reason(error, sorted(batch))}{takes}"
    ) from error


def _loss(e: Experiment, key, batch):
  model = e.model.make(key)
  amax = marks.largest(marks.histories(e.products, model))
  return e.objective(marks.low(e.products, model, amax), batch, key)


def _key() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(functools.partial(jax.random.key, 0))


def _is_of_libraries(error: Exception) -> bool:
  """Whether no code of the user's was running."""
  frames = traceback.extract_tb(error.__traceback__)
  files = [Path(f.filename) for f in frames if not f.filename.startswith("<")]
  return all(any(file.is_relative_to(place) for place in LIBRARIES) for file in files)


def _reason(error: Exception, there: list[str]) -> str:
  if isinstance(error, KeyError) and error.args[0] not in there:
    return f"it reads `{error.args[0]}`, and the batches have {', '.join(there)}"
  if isinstance(error, AttributeError) and error.name:
    return f"it asks for `{error.name}`, which {type(error.obj).__name__} does not have"
  return f"{str(error).strip().partition(chr(10))[0]} (BIGTRAIN_TRACEBACK=1 shows where)"
