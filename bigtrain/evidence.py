"""What is kept of a step whose update was not applied: its numbers, and rows of its batch.

    RUN/incidents/00000012/  incident.json  batch.npz  batch.txt or batch-00.png, batch-01.png, ...

`batch.npz` has the rows under the names of the batch's arrays, and as `rows` where in the batch
they stood. The text of a document is written as it was: whoever shows it has to escape it. Of a run
with many incidents the first ones have their batches, so that data which are bad for long fill no
disk.
"""

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from etils import epath

from bigtrain import files
from bigtrain.config import Refused
from bigtrain.experiment import Data
from bigtrain.lines import read_object
from bigtrain.secrets import first_line, redacted

if TYPE_CHECKING:
  from bigtrain.data.tokenizers import Tokenizer
  from bigtrain.run import Run

Cause = Literal["data", "precision", "optimizer", "hardware", "unknown", "not examined"]
ROWS = 64  # Of a batch that are kept, at most.
BATCHES = 100  # Of a run that are kept: of later incidents there is incident.json alone.
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Incident:
  """A step whose update was not applied."""

  step: int  # Its number: the update that followed `step - 1` completed ones.
  kind: Literal["nonfinite", "spike"]
  loss: float
  gradient_norm: float
  score: float | None  # Robust standard deviations above what was usual.
  policy: str
  examples: tuple[int, int]  # From the first to before the last.
  checkpoint: int | None  # The newest one from before.
  cause: Cause = "not examined"
  first_bad: str | None = None  # Of the tensors, in the order of computation.
  layers: Mapping[str, float] = dataclasses.field(default_factory=dict)  # Their sizes.
  rows: tuple[int, ...] = ()  # Of the batch, the worst ones first.
  again: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # What was done, and gave.
  note: str = ""  # What of this could not be done.

  @property
  def brief(self) -> str:
    return f"step {self.step}: its update was not applied, cause: {self.cause}"

  @property
  def told(self) -> str:
    """For people."""
    what = "is not finite" if self.score is None else f"spikes, by {self.score:.1f} deviations"
    first = f"; {self.first_bad} is the first tensor that is wrong" if self.first_bad else ""
    note = f" ({self.note})" if self.note else ""
    return (
      f"step {self.step}: the loss ({self.loss:.4g}) or its gradient ({self.gradient_norm:.4g}) "
      f"{what}, and its update was not applied; cause: {self.cause}{first}{note}"
    )


def incident(run: "Run", step: int, metrics: Mapping[str, Any]) -> Incident:
  """What is known of a step at once."""
  loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
  score = float(metrics.get("spike_score", math.nan))
  first, size = run.feed.example_at(step - 1), run.sizes.at(step - 1)
  return Incident(
    step,
    "spike" if math.isfinite(loss) and math.isfinite(norm) else "nonfinite",
    loss,
    norm,
    score if math.isfinite(score) else None,
    run.experiment.faults.policy,
    (first, first + size),
    max(
      (s for s in (*run.store.steps(), run.store.begun) if s is not None and s < step), default=None
    ),
    rows=tuple(range(min(size, ROWS))),
  )


def keep(run: "Run", found: Incident) -> tuple[Incident, str | None]:
  """Writes the incident and its batch. A failure to do so is noted, and ends nothing.

  Returns:
    The incident, with that note; and its path in the run directory, None where nothing is written.
  """
  if not run.directory.writes:
    return found, None
  try:
    folder = _folder(run.directory.path / "incidents", found)
    folder.mkdir(parents=True, exist_ok=True)
    kept = (folder / "batch.npz").exists() or len(list(folder.parent.iterdir())) <= BATCHES
  except OSError as error:
    return _noted(found, f"it could not be kept: {first_line(error)}"), None
  if not kept:
    found = _noted(found, f"its batch is not kept, as those of {BATCHES} incidents before it are")
  else:
    try:
      data, (first, end) = run.data.stage(found.step - 1), found.examples
      keep_batch(folder, data, read(data, first, end - first, found.rows), found.rows)
    except Exception as error:
      why = f"{type(error).__name__}: {first_line(error)}"
      found = _noted(found, f"its batch could not be kept: {why}")
  about = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
  try:
    files.replace_json(folder / "incident.json", redacted(_plain(about)))
  except OSError as error:
    found = _noted(found, f"it could not be kept: {first_line(error)}")
  return found, f"incidents/{folder.name}"


def _folder(incidents: epath.Path, found: Incident) -> epath.Path:
  """Where it is kept: as before where the same step is done again behind a restart."""
  name, number = f"{found.step:08}", 1
  folder = incidents / name
  # A step of that number with other data, behind a rollback; or nobody knows which, if damaged.
  while (folder / "incident.json").exists() and (
    read_object(folder / "incident.json").get("examples") != list(found.examples)
  ):
    number += 1
    folder = incidents / f"{name}-{number}"
  return folder


def _noted(found: Incident, note: str) -> Incident:
  return dataclasses.replace(found, note=f"{found.note}; {note}" if found.note else note)


def read(data: Data, example: int, size: int, rows: Sequence[int]) -> Batch:
  """These rows of a batch, in that order."""
  found = [data.batch(example, size, slice(row, row + 1)) for row in rows]
  return {name: np.concatenate([row[name] for row in found]) for name in found[0]}


def keep_batch(folder: epath.Path, data: Data, batch: Batch, rows: Sequence[int]) -> None:
  """Writes the rows of a batch into a folder that is there."""
  packed = io.BytesIO()
  arrays: dict[str, Any] = {"rows": np.asarray(rows), **batch}
  np.savez_compressed(packed, **arrays)
  (folder / "batch.npz").write_bytes(packed.getvalue())
  if "tokens" in batch:
    try:
      tokenizer = data.tokenizer
    except Refused:  # Tokens that stand for no text.
      return
    (folder / "batch.txt").write_text("".join(documents(tokenizer, batch, rows)))
  elif "inputs" in batch and batch["inputs"].ndim == 4:
    for i, image_RSC in enumerate(batch["inputs"]):
      (folder / f"batch-{i:02}.png").write_bytes(picture(image_RSC))


def documents(tokenizer: "Tokenizer", batch: Batch, rows: Sequence[int]) -> Iterator[str]:
  """Every document of these rows under a line that says which it is."""
  for row, tokens_T, segments_T in zip(rows, batch["tokens"], batch["segments"], strict=True):
    for number in np.unique(segments_T[segments_T > 0]):
      ids = tokens_T[segments_T == number]
      known = (ids >= 0) & (ids < tokenizer.vocab)
      odd = f", ids that stand for nothing: {ids[~known].tolist()[:20]}" * (not known.all())
      yield f"--- row {row}, document {number}{odd}\n{tokenizer.decode(ids[known])}\n"


def picture(image_RSC: np.ndarray) -> bytes:
  """A PNG of an image in any units: its least number black, its greatest white, NaN black."""
  from PIL import Image

  finite = np.isfinite(image_RSC)
  low, high = np.min(image_RSC, initial=np.inf, where=finite), 0.0
  high = np.max(image_RSC, initial=-np.inf, where=finite)
  share = (np.where(finite, image_RSC, low) - low) / max(high - low, 1e-9) if finite.any() else 0
  pixels = np.broadcast_to(np.asarray(255 * share).astype(np.uint8), image_RSC.shape)
  if pixels.shape[-1] not in (1, 3):
    pixels = pixels[..., :1]
  packed = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(packed, "PNG")
  return packed.getvalue()


def _plain(value: Any) -> Any:
  """For JSON, which has no NaN."""
  if isinstance(value, Mapping):
    return {name: _plain(x) for name, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
