"""Tokens that were masked, and whether one text follows another (BERT, arXiv:1810.04805).

Dims: B batch, T position, D model, V vocabulary, C classes.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bigtrain import sharding, taps
from bigtrain.config import Refused, config
from bigtrain.experiment import ObjectiveConfig
from bigtrain.kernels.cross_entropy import cross_entropy
from bigtrain.objectives.output import Output, by_source
from bigtrain.parallel.context import cut, first


@config
class MaskedLM(ObjectiveConfig):
  """Guesses masked tokens, and whether a pair's second text follows where the batch says that.

  The model is a MaskedLanguageModel. Logits are made for every position, though about one in seven
  counts: of BERT base's products a seventh is the output table's, so that picking out the masked
  positions would save an eighth of the step.

  A pair's label counts as much as all the masked tokens of its row, so that both losses weigh the
  same, as in BERT, in whatever parts a batch is. Metrics: `loss` and `accuracy` of the masked
  tokens, `loss/<source>` where the data is a mixture, `next_sentence_loss` and
  `next_sentence_accuracy` of the pairs.
  """

  takes: ClassVar[str] = "a MaskedLMConfig and MaskedText"

  loss_chunk: int | None = 1024  # As in CausalLM.

  def check(self) -> None:
    if self.loss_chunk is not None and self.loss_chunk < 1:
      raise Refused(
        f"loss_chunk is {self.loss_chunk}; give a number of tokens, or None (no chunks)"
      )

  def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    if ("next_sentence" in batch) != model.c.next_sentence:
      raise Refused(
        f"data.next_sentence is {'next_sentence' in batch} but model.next_sentence "
        f"{model.c.next_sentence}: give both the same"
      )
    with cut(batch) as batch:
      return self._output(model, batch, key)

  def _output(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    rows = (batch[name] for name in ("tokens", "positions", "segments", "token_types"))
    with taps.named("encoder"):
      x_BTD = model.encoder(*rows, key)
    x_BTM = sharding.shared(model.predictions(x_BTD))
    table_VD, bias_V = model.output(x_BTM)
    weights_BT = batch["weights"]
    with jax.named_scope("loss"):
      loss, sums = cross_entropy(
        x_BTM,
        table_VD,
        batch["targets"],
        weights_BT,
        chunk=self.loss_chunk,
        bias_V=bias_V,
      )
    weight = weights_BT.sum()
    metrics = {"loss": (sums["nll"], weight), "accuracy": (sums["correct"], weight)}
    metrics |= by_source(batch, sums["nll_BT"], weights_BT)
    if "next_sentence" in batch:
      log_p_BC = jax.nn.log_softmax(model.next_sentence(x_BTD))
      hit_BC = batch["next_sentence"][:, None] == jnp.arange(2)
      nll_B = -(hit_BC * log_p_BC).sum(1)
      loss += (weights_BT.sum(1) * nll_B).sum()
      pair_B = (first(batch["segments"]) > 0).astype(jnp.float32)
      right_B = log_p_BC.argmax(1) == batch["next_sentence"]
      metrics["next_sentence_loss"] = ((pair_B * nll_B).sum(), pair_B.sum())
      metrics["next_sentence_accuracy"] = ((pair_B * right_B).sum(), pair_B.sum())
    return Output(loss, weight, metrics)

  def derived(self, means: dict[str, float]) -> dict[str, float]:
    return {"perplexity": math.exp(min(means["loss"], 700.0))}
