"""Texts as vectors: the mean of an encoder's last hidden states, of length one.

As Sentence-BERT does (Reimers & Gurevych 2019, arXiv:1908.10084): the cosine of two texts is the
dot product of their vectors.

Dims: N texts, B texts at once, T position, D model.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bigtrain.config import Refused
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.encoder import Encoder

SHORTEST = 16  # Tokens; rows are padded to a power of two, so that few programs are compiled.


def embed(
  model: Encoder,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  *,
  longest: int = 256,
  batch: int = 32,
) -> np.ndarray:
  """The vectors of some texts, (N, D) float32, each of length one.

  Args:
    model: an encoder; one that was trained for this, such as all-MiniLM-L6-v2.
    tokenizer: of that model, with the special tokens [CLS] and [SEP].
    texts: any number, of any length.
    longest: tokens of a text, the two special ones among them; the rest of it is left out.
    batch: texts at once. Those of like length are taken together.

  Raises:
    Refused: the model has fewer than `longest` positions, or the tokenizer no special tokens.
  """
  positions = model.c.longest_row()
  if positions is not None and not 2 <= longest <= positions:
    raise Refused(f"longest is {longest}: from 2 to the model's {positions} positions")
  cls, sep = tokenizer.id_of("[CLS]"), tokenizer.id_of("[SEP]")
  rows = [[cls, *ids[: longest - 2], sep] for ids in tokenizer.encode_batch(list(texts))]
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
  found = np.zeros((len(rows), model.c.dim), np.float32)
  for first in range(0, len(rows), batch):
    here = order[first : first + batch]
    width = min(max(SHORTEST, 1 << (len(rows[here[-1]]) - 1).bit_length()), longest)
    tokens_BT, segments_BT = np.zeros((2, batch, width), np.int32)
    for row, i in enumerate(here):
      tokens_BT[row, : len(rows[i])], segments_BT[row, : len(rows[i])] = rows[i], 1
    found[here] = _means(model, tokens_BT, segments_BT)[: len(here)]
  return found


@jax.jit
def _means(model: Encoder, tokens_BT, segments_BT) -> jax.Array:
  x_BTD = model(tokens_BT, None, segments_BT).astype(jnp.float32)
  real_BT1 = (segments_BT > 0)[..., None]
  mean_BD = (x_BTD * real_BT1).sum(1) / jnp.maximum(real_BT1.sum(1), 1)
  return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)
