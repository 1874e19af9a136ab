"""Time and memory of a transformer's step in closed form, to prune a search before any compilation.

The reasoning is that of "How to scale your model" (jax-ml.github.io/scaling-book/training):

- Compute is the model's FLOPs, and what is computed again, at 80% of the chip's peak.
- Over `fsdp` each layer's weights are gathered in the forward pass and in the backward pass, for
  every microbatch, while the layer before computes: only what takes longer than the compute shows.
  Its gradients are reduce-scattered once a microbatch, which nothing hides.
- Over `tensor` a layer's activations are summed twice forward and twice backward, and nothing hides
  that either. So it pays only where there are too few tokens a chip to hide the gathers.
- Over `data` and `slices` gradients are all-reduced once a step.
- What waits on the host is sent there and comes back, both ways at once: activations while layers
  compute, the optimizer's state between the gradient and the update, which nothing hides.

Memory is the state, one gradient of it, what the remat policy keeps of every layer, and what one
layer and the loss work with. It does not know attention's scores, which a kernel never stores.
"""

import dataclasses
import math
from typing import Any

from bigtrain.experiment import Experiment
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.moe import MoEConfig
from bigtrain.models.remat import INPUT, KEPT
from bigtrain.models.transformer import TransformerConfig
from bigtrain.plan.compile import lengths
from bigtrain.plan.network import Network
from bigtrain.plan.topologies import Topology

EFFICIENCY = 0.8  # Of the peak, in compute.
BF16, F32 = 2, 4


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a search need find out only once: bytes of the weights and of the optimizer's state."""

  weights: int
  optimizer: int
  parameters: int  # Their number.

  @classmethod
  def of(cls, experiment: Experiment) -> "Sizes":
    import jax

    from bigtrain.program import Program

    state = jax.eval_shape(lambda: Program(experiment, None).init(jax.random.key(0)))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    parameters = sum(x.size for x in jax.tree.leaves(state.model))
    return cls(size(state.model), size(state.optimizer), parameters)


@dataclasses.dataclass(frozen=True)
class Guess:
  """A step on each chip in closed form."""

  compute: float  # Seconds, as all of these.
  gathers: float
  scatters: float
  tensor: float
  replicas: float
  offload: float  # Of activations,
  host: float  # and of the optimizer's state.
  state: float  # Bytes, as all of these.
  kept: float
  working: float

  @property
  def seconds(self) -> float:
    hidden = max(self.compute, self.gathers, self.offload)
    return hidden + self.scatters + self.tensor + self.replicas + self.host

  @property
  def memory(self) -> float:
    return self.state + self.kept + self.working

  def why(self) -> str:
    """What the time is made of, in a line."""
    parts = {"compute": self.compute, "gathers": self.gathers, "scatters": self.scatters}
    parts |= {"tensor": self.tensor, "replicas": self.replicas}
    parts |= {"offload": self.offload, "host": self.host}
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds)


def guess(e: Experiment, topology: Topology, sizes: Sizes, network: Network) -> Guess:
  """The closed forms for an experiment whose model is a stack of blocks."""
  c: Any = e.model
  axes = network.axes
  split = axes["tensor"] * axes["sequence"]
  shards = math.prod(axes[a] for a in ("fsdp", "expert", "context"))
  rows = e.batch / math.prod(axes[a] for a in ("slices", "data", "fsdp", "expert"))
  of_rows = lengths(e)
  tokens = rows * sum(of_rows) / e.microbatches / axes["context"]  # That a chip has at a time.
  layers = c.layers / axes["pipeline"]
  weights = sizes.parameters * BF16 / split / axes["pipeline"]
  link = lambda kind, size, *over: network.seconds(kind, size, network.along(over))
  flops = (e.model.flops(*of_rows) or 0.0) * e.batch / topology.chips
  forward = tokens * c.dim * BF16 * layers * e.microbatches
  sums = 4 + 2 * (c.remat not in ("none", "products"))
  gradient = sizes.parameters * F32 / split / shards / axes["pipeline"]
  kept, sent = (layers * tokens * size for size in _kept(c, split))
  optimizer = sizes.optimizer / split / shards / axes["pipeline"]
  return Guess(
    compute=flops * (1 + _again(c)) / (EFFICIENCY * topology.chip.bf16),
    gathers=2 * e.microbatches * link("all-gather", weights, "fsdp", "expert", "context"),
    scatters=e.microbatches * link("reduce-scatter", weights, "fsdp", "expert", "context"),
    tensor=sums * link("all-reduce", forward, "tensor", "sequence"),
    replicas=link("all-reduce", gradient, "data") + link("all-reduce", gradient, "slices"),
    offload=sent * e.microbatches / topology.chip.host,
    host=e.optimizer_on_host * optimizer / topology.chip.host,
    state=sizes.weights / split / shards / axes["pipeline"] + (not e.optimizer_on_host) * optimizer,
    kept=kept,
    working=gradient * (1 + (e.microbatches > 1)) + _working(e, tokens, weights / layers, split),
  )


def _again(c: TransformerConfig) -> float:
  """Of the model's FLOPs, the share that the backward pass computes again."""
  return {"none": 0.0, "products": 0.03, "qkv": 0.2, "attention": 0.28}.get(c.remat, 1 / 3)


def _kept(c: TransformerConfig, split: int) -> tuple[float, float]:
  """Bytes of one token of one layer that the remat policy keeps on the chip, and on the host."""
  block = c.pattern[0]
  s, f = block.attention.sizes(c.dim), block.feed_forward
  head, up = s["H"] / split, _hidden(f) / split
  widths = {"q": s["K"] * s["G"] * head, "k": s["K"] * head, "v": s["K"] * head}
  widths |= {
    INPUT: c.dim,
    "residual": c.dim,
    "attention": widths["q"],
    "up": up,
    "gate": up,
    "received": 0.0,
  }
  if isinstance(f, MoEConfig):
    widths["received"] = c.dim * f.top_k
  elif not f.gated:
    widths["gate"] = 0.0
  kept = c.kept()
  names = {INPUT, *(KEPT["products"] if kept is None else kept)}
  here = (c.remat == "none") * 7 * c.dim + sum(widths[name] for name in names - {*c.offload})
  return BF16 * here, BF16 * sum(widths[name] for name in c.offload)


def _hidden(f: FeedForwardConfig | MoEConfig) -> int:
  """Hidden units that a token passes through."""
  return f.hidden * f.top_k + f.shared if isinstance(f, MoEConfig) else f.hidden


def _working(e: Experiment, tokens: float, layer: float, split: int) -> float:
  """Bytes of the weights, activations and logits that are worked on."""
  c: Any = e.model
  block, vocabulary = c.pattern[0], (c.vocabulary() or 0) / split
  s = block.attention.sizes(c.dim)
  wide = 4 * c.dim + 3 * _hidden(block.feed_forward) / split + 4 * s["K"] * s["G"] * s["H"] / split
  chunk = min(getattr(e.objective, "loss_chunk", None) or tokens, tokens)
  loss = chunk * vocabulary * (F32 + F32 + BF16) + vocabulary * c.dim * (BF16 + F32)
  return 2 * layer + max(tokens * wide * BF16, loss)
