"""What is minimised: one file an objective.

Everything in an Output is a sum over the batch, so that microbatches, hosts and packed rows with
different numbers of tokens add up exactly; whoever holds the global sums divides once.
"""

from bigtrain.objectives.causal_lm import CausalLM
from bigtrain.objectives.masked_lm import MaskedLM
from bigtrain.objectives.output import Output
from bigtrain.objectives.span_corruption import SpanCorruption

__all__ = ["CausalLM", "MaskedLM", "Output", "SpanCorruption"]
