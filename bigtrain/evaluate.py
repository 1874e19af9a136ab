"""Evaluation: metrics over the whole held-out split, and continued prompts.

Every held-out example counts exactly once: the last batch is padded with rows of weight 0, and sums
and weights are added up before they are divided, so that the number of processes changes nothing.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from bigtrain import sharding
from bigtrain.config import Refused
from bigtrain.data.feed import put
from bigtrain.objectives.experts import with_experts
from bigtrain.parts import Part
from bigtrain.phases import got_on

if TYPE_CHECKING:
  from bigtrain.run import Run


class Evaluator:
  """Computes the held-out metrics of a run's current weights, by a step compiled once."""

  def __init__(self, run: "Run"):
    self.run = run
    objective = with_experts(run.experiment.objective)

    def add(sums, model, batch):
      output = objective(model, batch, None)
      pairs = {k: jnp.stack(pair).astype(jnp.float32) for k, pair in output.metrics.items()}
      found = pairs, output.weight.astype(jnp.float32)
      return found if sums is None else jax.tree.map(jnp.add, sums, found)

    self._add = jax.jit(add)

  def metrics(self) -> dict[str, float]:
    """Each metric's mean by weight, and what the objective derives from these.

    Left out is what has no weight, such as the loss of a source of which nothing is held out.

    Raises:
      Refused: nothing is held out.
    """
    data, size = self.run.data, self.run.experiment.evaluation.batch
    if not data.eval_examples():
      raise Refused(
        "the data holds nothing out to evaluate on; set the source's `validation`, as to 0.01"
      )
    place, weights = sharding.batch_sharding(), self.run.weights
    sums = None
    for example in range(0, data.eval_examples(), size):
      rows = lambda wanted, example=example: data.eval_batch(example, size, wanted)
      batch = put(rows, size, place)
      jax.block_until_ready(sums)  # One batch ahead: more take memory, and on CPU may deadlock.
      sums = self._add(sums, weights, batch)
      got_on()
    pairs, weight = jax.device_get(sums)
    values = {name: float(total) / float(w) for name, (total, w) in pairs.items() if w}
    return values | (self.run.experiment.objective.derived(values) if weight else {})


class Evaluating(Part):
  """Evaluates and samples at the interval and at the end."""

  def start(self, run: "Run", step: int) -> None:
    super().start(run, step)
    self.evaluator = Evaluator(run)
    if (c := run.experiment.evaluation).prompts:  # Now, not after hours of training.
      from bigtrain.generate import check_text

      check_text(run.weights, run.data.tokenizer, c.prompts, c.sample_tokens)

  def after_step(self, step: int, metrics) -> None:
    c, last = self.run.experiment.evaluation, self.run.experiment.steps
    if not (c.every and step % c.every == 0) and step != last:
      return
    if self.run.data.eval_examples():
      with self.run.away("evaluate", step=step):
        values = self.evaluator.metrics()
      values = {f"eval/validation/{name}": value for name, value in values.items()}
      self.run.record(step, "eval", values)
    if c.prompts:
      with self.run.away("sample", step=step):
        self._sample(step)

  def _sample(self, step: int) -> None:
    from bigtrain.generate import Sampling, generate_text

    c = self.run.experiment.evaluation
    sampling = Sampling(temperature=c.temperature, seed=self.run.experiment.seed)
    texts = generate_text(
      self.run.weights, self.run.data.tokenizer, list(c.prompts), c.sample_tokens, sampling
    )
    for prompt, text in zip(c.prompts, texts, strict=True):
      self.run.text(step, prompt, text)
