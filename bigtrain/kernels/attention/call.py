"""What attention is asked for, and which keys a query sees.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head, P
distance: of a query and a key, T + S - 1 of them.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Kernel = Literal["auto", "plain", "blockwise", "splash", "cudnn", "tokamax"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where the tokens of a row stand: all that a mask or a rotation needs to know about them."""

  positions: jax.Array  # (B, T) int32: from 0 within each document; negative for an empty slot.
  segments: jax.Array | None = None  # (B, T) int32 from 0: the document; None where all is one.


class Form(NamedTuple):
  """Which keys of its document a query sees, what becomes of a score, and who computes it."""

  causal: bool  # It sees itself and what is before it.
  window: int | None = None  # Positions seen, itself included; None for all.
  softcap: float | None = None  # Scores are squashed to c * tanh(score / c) (arXiv:2408.00118).
  # Column t of queries and of keys is the same token, and documents stand side by side, each in the
  # order of its positions; without segments no slot is empty. What comes before a token is then
  # known from columns, while tracing, and blocks that nobody sees are never computed.
  aligned: bool = False
  kernel: Kernel = "auto"

  def sees(self, distance):
    """Whether a query sees a key of its document so many positions before it."""
    seen = distance >= 0 if self.causal else True
    if self.window is not None:
      seen &= abs(distance) < self.window
    return seen


class Call(NamedTuple):
  """Queries, keys and values, and what attention makes of them."""

  q_BTKGH: Any  # Scaled.
  k_BSKH: Any
  v_BSKH: Any
  queries: Tokens
  keys: Tokens
  form: Form
  # Added by distance, after a soft cap: entry p to the score of column s for the query in column
  # t = s - p + T - 1. It is a vector for each head, so that a kernel that goes through the scores
  # block by block needs no array of their size.
  bias_KGP: Any = None
  dropout: float = 0.0  # Rate; of a call without a key 0.
  key: Any = None


def named(q, k, v) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values with the names by which a remat policy keeps them."""
  return checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")


def documents(queries: Tokens, keys: Tokens) -> tuple[jax.Array, jax.Array]:
  """The document of each query (B, T) and of each key (B, S), int32; of empty slots, none."""
  packed = queries.segments is not None and keys.segments is not None
  document = lambda t: t.segments if packed else jnp.zeros_like(t.positions)
  empty = lambda t, label: jnp.where(t.positions < 0, label, document(t))
  return empty(queries, -1), empty(keys, -2)  # Two labels: what is empty does not see itself.


def visible(queries: Tokens, keys: Tokens, form: Form) -> jax.Array:
  """Which keys each query attends to, (B, T, S) bool: of its own document, by the form."""
  query_BT, key_BS = documents(queries, keys)
  mask_BTS = query_BT[:, :, None] == key_BS[:, None, :]
  if form.aligned:
    columns = jnp.arange(mask_BTS.shape[1])
    return mask_BTS & form.sees(columns[:, None] - columns)
  return mask_BTS & form.sees(queries.positions[:, :, None] - keys.positions[:, None, :])
