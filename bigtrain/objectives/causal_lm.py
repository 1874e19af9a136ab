"""The next token.

Dims: B batch, T position, D model, V vocabulary.
"""

import math
from typing import Any, ClassVar

import jax

from bigtrain import sharding
from bigtrain.config import Refused, config
from bigtrain.experiment import ObjectiveConfig
from bigtrain.kernels.cross_entropy import cross_entropy
from bigtrain.objectives.output import Output, by_source
from bigtrain.parallel.context import cut


@config
class CausalLM(ObjectiveConfig):
  """Predicts each token of `batch["targets"]`, weighted by `batch["weights"]`.

  The model offers `hidden(tokens_BT, positions_BT, segments_BT, key) -> x_BTD` and
  `output_VD(x_BTD) -> table_VD`. Metrics: `loss` (nats a token, without smoothing and z-loss, so
  that runs compare), `loss/<source>` where the data is a mixture, `accuracy`, `z_loss` where it is
  on, `bits_per_byte` and `nats_per_byte` where the batch has `bytes`; of an evaluation also
  `perplexity`.
  """

  takes: ClassVar[str] = "a decoder, such as presets.gpt2(...), and TextData"

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
    with cut(batch) as batch:
      return self._output(model, batch, key)

  def _output(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    x_BTD = sharding.shared(self.hidden(model, batch, key))
    weights_BT = batch["weights"]
    with jax.named_scope("loss"):
      loss, sums = cross_entropy(
        x_BTD,
        model.output_VD(x_BTD),
        batch["targets"],
        weights_BT,
        chunk=self.loss_chunk,
        z_loss=self.z_loss,
        label_smoothing=self.label_smoothing,
      )
    weight = weights_BT.sum()
    metrics = {"loss": (sums["nll"], weight), "accuracy": (sums["correct"], weight)}
    metrics |= by_source(batch, sums["nll_BT"], weights_BT)
    if self.z_loss:
      metrics["z_loss"] = (sums["z_loss"], weight)
    if "bytes" in batch:
      n_bytes = (weights_BT * batch["bytes"]).sum()
      metrics["bits_per_byte"] = (sums["nll"] / math.log(2), n_bytes)
      metrics["nats_per_byte"] = (sums["nll"], n_bytes)
    return Output(loss, weight, metrics)

  def hidden(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    """What the output table is multiplied with to predict the targets, (B, T, D)."""
    return model.hidden(batch["tokens"], batch["positions"], batch["segments"], key)

  def derived(self, means: dict[str, float]) -> dict[str, float]:
    return {"perplexity": math.exp(min(means["loss"], 700.0))}  # Above, a float overflows.
