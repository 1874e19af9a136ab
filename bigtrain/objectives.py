"""What is minimised: functions (model, batch, key) -> Output.

Everything in an Output is a sum over the batch, so that microbatches, hosts and packed rows with
different numbers of tokens add up exactly; whoever holds the global sums divides once.

Dims: B batch, T position, D model, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from bigtrain.config import Refused, config
from bigtrain.experiment import ObjectiveConfig
from bigtrain.kernels.cross_entropy import cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What an objective says about a batch. Two Outputs add leaf by leaf, `variables` aside."""

  loss_sum: jax.Array  # What is differentiated, summed over the batch, float32.
  weight: jax.Array  # What `loss_sum` is divided by.
  metrics: dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight): their ratio is meant.
  # The second part of `state.partition(model)` as it is after this batch; None if unchanged.
  variables: Any = None
  taps: dict[str, Any] = dataclasses.field(default_factory=dict)  # Statistics of the layers.


@config
class CausalLM(ObjectiveConfig):
  """Predicts each token of `batch["targets"]`, weighted by `batch["weights"]`.

  The model offers `hidden(tokens_BT, positions_BT, segments_BT, key) -> x_BTD` and
  `output_VD() -> table_VD`. Metrics: `loss` (nats a token, without smoothing and z-loss, so that
  runs compare), `accuracy`, `z_loss` where it is on, `bits_per_byte` and `nats_per_byte` where the
  batch has `bytes`; of an evaluation also `perplexity`.
  """

  # Tokens whose logits a device holds at once, in float32; None: all, in the compute dtype. A chunk
  # of N tokens moves the table and its gradient once, 10 bytes for each 6 N operations: from 1,024
  # on, a TPU v5p (166 operations a byte) and an H100 (295) compute for longer than they wait.
  loss_chunk: int | None = 1024
  z_loss: float = 0.0  # Factor of logsumexp^2; PaLM's is 1e-4 (arXiv:2204.02311).
  label_smoothing: float = 0.0  # Share of the target's probability spread over the vocabulary.

  def check(self) -> None:
    if self.loss_chunk is not None and self.loss_chunk < 1:
      raise Refused(
        f"loss_chunk is {self.loss_chunk}; give a number of tokens, or None (no chunks)"
      )
    if self.z_loss < 0:
      raise Refused(f"z_loss is {self.z_loss}; it is a factor of at least 0, such as 1e-4")
    if not 0 <= self.label_smoothing < 1:
      raise Refused(f"label_smoothing is {self.label_smoothing}; it is a share, from 0 to below 1")

  def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    x_BTD = model.hidden(batch["tokens"], batch["positions"], batch["segments"], key)
    weights_BT = batch["weights"]
    with jax.named_scope("loss"):
      loss, sums = cross_entropy(
        x_BTD,
        model.output_VD(),
        batch["targets"],
        weights_BT,
        chunk=self.loss_chunk,
        z_loss=self.z_loss,
        label_smoothing=self.label_smoothing,
      )
    weight = weights_BT.sum()
    metrics = {"loss": (sums["nll"], weight), "accuracy": (sums["correct"], weight)}
    if self.z_loss:
      metrics["z_loss"] = (sums["z_loss"], weight)
    if "bytes" in batch:
      n_bytes = (weights_BT * batch["bytes"]).sum()
      metrics["bits_per_byte"] = (sums["nll"] / math.log(2), n_bytes)
      metrics["nats_per_byte"] = (sums["nll"], n_bytes)
    return Output(loss, weight, metrics)

  def derived(self, means: dict[str, float]) -> dict[str, float]:
    return {"perplexity": math.exp(min(means["loss"], 700.0))}  # Above, a float overflows.


@config
class MaskedLM(ObjectiveConfig):
  """Guesses masked tokens, and whether a pair's second text follows where the batch says that.

  The model is a MaskedLanguageModel. Logits are made for every position, though about one in seven
  counts: of BERT base's products a seventh is the output table's, so that picking out the masked
  positions would save an eighth of the step.

  A pair's label counts as much as all the masked tokens of its row, so that both losses weigh the
  same, as in BERT, in whatever parts a batch is. Metrics: `loss` and `accuracy` of the masked
  tokens, `next_sentence_loss` and `next_sentence_accuracy` of the pairs.
  """

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
    rows = (batch[name] for name in ("tokens", "positions", "segments", "token_types"))
    x_BTD = model.encoder(*rows, key)
    table_VD, bias_V = model.output()
    weights_BT = batch["weights"]
    with jax.named_scope("loss"):
      loss, sums = cross_entropy(
        model.predictions(x_BTD),
        table_VD,
        batch["targets"],
        weights_BT,
        chunk=self.loss_chunk,
        bias_V=bias_V,
      )
    weight = weights_BT.sum()
    metrics = {"loss": (sums["nll"], weight), "accuracy": (sums["correct"], weight)}
    if "next_sentence" in batch:
      log_p_BC = jax.nn.log_softmax(model.next_sentence(x_BTD))
      hit_BC = batch["next_sentence"][:, None] == jnp.arange(2)
      nll_B = -(hit_BC * log_p_BC).sum(1)
      loss += (weights_BT.sum(1) * nll_B).sum()
      pair_B = (batch["segments"][:, 0] > 0).astype(jnp.float32)
      right_B = log_p_BC.argmax(1) == batch["next_sentence"]
      metrics["next_sentence_loss"] = ((pair_B * nll_B).sum(), pair_B.sum())
      metrics["next_sentence_accuracy"] = ((pair_B * right_B).sum(), pair_B.sum())
    return Output(loss, weight, metrics)

  def derived(self, means: dict[str, float]) -> dict[str, float]:
    return {"perplexity": math.exp(min(means["loss"], 700.0))}
