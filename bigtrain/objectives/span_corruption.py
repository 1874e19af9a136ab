"""Spans that were taken out of a text (T5, arXiv:1910.10683).

Dims: B batch, S source position, T target position, D model.
"""

from typing import Any, ClassVar

import jax

from bigtrain.config import config
from bigtrain.kernels.attention import Tokens
from bigtrain.objectives.causal_lm import CausalLM


@config
class SpanCorruption(CausalLM):
  """Predicts each of an encoder-decoder's targets from those before it and from the source.

  The model is an EncoderDecoder, the data Spans. Loss, metrics and settings are those of CausalLM,
  over `batch["targets"]` by `batch["weights"]`: the next token it is, of the decoder's row.
  """

  takes: ClassVar[str] = "an encoder-decoder, such as presets.t5(...), and Spans"

  def hidden(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    source = Tokens(batch["positions"], batch["segments"])
    target = Tokens(batch["target_positions"], batch["target_segments"])
    inputs_BT = model.shifted(batch["targets"], target.positions)
    return model.hidden(batch["tokens"], inputs_BT, source, target, key)
