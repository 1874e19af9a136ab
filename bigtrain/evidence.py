"""What is kept of a batch: its rows as arrays, and as people read or see them.

    RUN/incidents/00000012/  incident.json  batch.npz  batch.txt or batch-00.png, batch-01.png, ...

`batch.npz` has the rows under the names of the batch's arrays, and as `rows` where in the batch
they stood. The text of a document is written as it was: whoever shows it has to escape it.
"""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from bigtrain.config import Refused
from bigtrain.experiment import Data

if TYPE_CHECKING:
  from bigtrain.data.tokenizers import Tokenizer

ROWS = 64  # Of a batch that are kept, at most.
Batch = dict[str, np.ndarray]


def read(data: Data, example: int, size: int, rows: Sequence[int]) -> Batch:
  """These rows of a batch, in that order."""
  found = [data.batch(example, size, slice(row, row + 1)) for row in rows]
  return {name: np.concatenate([row[name] for row in found]) for name in found[0]}


def keep(folder: epath.Path, data: Data, batch: Batch, rows: Sequence[int]) -> None:
  """Writes the rows of a batch into a folder that is there."""
  packed = io.BytesIO()
  np.savez_compressed(packed, allow_pickle=False, rows=np.asarray(rows), **batch)
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
