"""The softmax cross-entropy of a vocabulary projection, without the logits of the whole batch.

Each device goes through its own tokens in chunks. When a gradient is wanted, a chunk's gradients
are computed beside its loss (Liger Kernel, arXiv:2410.10989), while its logits are at hand: three
matrix products instead of the four of recomputation, and nothing of size T * V is ever kept.

Dims: B batch, T position, D model, V vocabulary, C chunks, N tokens (of a chunk).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from bigtrain.mesh import ordered
from bigtrain.precision import raised
from bigtrain.sharding import axes


def cross_entropy(
  x_BTD: jax.Array,
  table_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int | None,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  bias_V: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted sum over tokens of -log softmax(x @ table.T + bias)[target], with its usual extras.

  A token's loss is `(1 - s) * nll + s * mean over V of -log p + z_loss * logsumexp^2`, with s the
  label smoothing (Szegedy 2015, arXiv:1512.00567) and the last term PaLM's (arXiv:2204.02311).
  Reductions are in float32. Under a mesh this is an island over every axis: B may be sharded, and
  V of the table; each gradient is summed over devices once, whatever the number of chunks.

  Args:
    x_BTD: final hidden states in the compute dtype, D whole.
    table_VD: output table in the compute dtype, D whole; `sharding.use` types it so that its
      gradient need not be summed here.
    targets_BT: int32 below V.
    weights_BT: float32 factors of the tokens' losses. They receive no gradient.
    chunk: most tokens a device takes at once, with float32 logits. None: all of them at once, with
      logits rounded to the compute dtype.
    z_loss: factor of the squared logsumexp.
    label_smoothing: share of the target's probability that is spread over the vocabulary.
    bias_V: added to every token's logits, sharded as the table's V.

  Returns:
    The loss, which can be differentiated, and a dict of weighted sums which cannot: `nll`, `z_loss`
    (with its factor), `correct` (no logit is higher than the target's); and `nll_BT`, not summed.
  """
  settings = (chunk, z_loss, label_smoothing)
  results: Any = _cross_entropy(settings, x_BTD, table_VD, bias_V, targets_BT, weights_BT)
  loss, sums, nll_BT = results
  return loss, sums | {"nll_BT": nll_BT}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(settings, *arrays) -> Any:
  return _island(settings, False, *arrays)


def _forward(settings, *arrays):
  loss, sums, nll_BT, *gradients = _island(settings, True, *arrays)
  return (loss, sums, nll_BT), gradients


def _backward(_, gradients, cotangents):

  def scale(gradient):
    factor, parts = cotangents[0], jax.typeof(gradient).sharding.spec.unreduced
    if parts:
      factor = jax.sharding.reshard(factor, P(reduced=parts))
    return (factor * gradient).astype(gradient.dtype)

  return *jax.tree.map(scale, gradients), None, None


_cross_entropy.defvjp(_forward, _backward)


def _island(settings, differentiate: bool, *arrays) -> Any:
  """(loss, sums, nll_BT) of the whole batch, and (dx, dtable, dbias) where they are wanted."""
  local = functools.partial(_local, settings, differentiate)
  manual = set(jax.sharding.get_abstract_mesh().explicit_axes)
  if not manual:  # No mesh, or already inside an island: those do not nest.
    return local(*arrays)
  specs = tuple(jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays))
  gradients = tuple(jax.tree.map(_of_gradient, specs[: 3 * differentiate]))
  out_specs = (P(), P(), specs[3], *gradients)
  return jax.shard_map(local, in_specs=specs, out_specs=out_specs, axis_names=manual)(*arrays)


def _of_gradient(spec: P) -> P:
  return spec.update(reduced=frozenset(), unreduced=spec.reduced)


def _local(settings, differentiate, x_BTD, table_VD, bias_V, targets_BT, weights_BT):
  """What one device does with its tokens and its rows of the table."""
  chunk, z_loss, label_smoothing = settings
  tokens = targets_BT.size
  chunks = math.ceil(tokens / (chunk or tokens))
  split = lambda a: _split(a.reshape(tokens, *a.shape[2:]), chunks)
  wide = raised(x_BTD.dtype)
  logits_dtype = wide if chunk else x_BTD.dtype
  vocabulary = _vocabulary_axes(table_VD)

  def step(gradients: Any, xs) -> Any:
    x_ND, targets_N, weights_N = xs
    logits_NV = _product("nd,vd->nv", x_ND, table_VD).astype(logits_dtype).astype(wide)
    if bias_V is not None:
      logits_NV += bias_V
    sums, nll_N, dlogits_NV = _token_sums(
      logits_NV, targets_N, weights_N, vocabulary, z_loss, label_smoothing
    )
    if not differentiate:
      return gradients, (sums, nll_N, ())
    more_V = jax.tree.map(lambda _: dlogits_NV.sum(0), bias_V)
    dlogits_NV = dlogits_NV.astype(x_ND.dtype)
    dx_ND = _product("nv,vd->nd", dlogits_NV, table_VD).astype(x_ND.dtype)
    more_VD = _product("nv,nd->vd", dlogits_NV, x_ND)
    return jax.tree.map(jnp.add, gradients, (more_VD, more_V)), (sums, nll_N, dx_ND)

  start: Any = ()
  if differentiate:
    varying = ordered(_varying(x_BTD) | _varying(table_VD))
    zeros = lambda a: jax.lax.pcast(jnp.zeros(a.shape, wide), varying, to="varying")
    start = jax.tree.map(zeros, (table_VD, bias_V))
  gradients, (sums, nll_CN, dx_CND) = jax.lax.scan(
    step, start, (*map(split, (x_BTD, targets_BT, weights_BT)),)
  )
  sums = {name: jax.lax.psum(s_C.sum(), ordered(_varying(s_C))) for name, s_C in sums.items()}
  loss = sums.pop("loss")
  nll_BT = nll_CN.reshape(-1)[:tokens].reshape(targets_BT.shape)
  nll_BT = jax.lax.psum(nll_BT, ordered(_varying(nll_BT) - _varying(targets_BT)))
  if not differentiate:
    return loss, sums, nll_BT
  dx_BTD = dx_CND.reshape(-1, x_BTD.shape[-1])[:tokens].reshape(x_BTD.shape)
  gradients = jax.tree.map(_typed_as, (dx_BTD, *gradients), (x_BTD, table_VD, bias_V))
  return loss, sums, nll_BT, *gradients


def _token_sums(logits_NV, targets_N, weights_N, split, z_loss, label_smoothing):
  """A chunk's weighted sums, its tokens' nll, and the gradient of its loss by the logits.

  `split` names the axes over which the vocabulary is spread.
  """
  rows = logits_NV.shape[-1]
  V, first = rows, 0
  if split:
    V, first = rows * jax.lax.axis_size(split), rows * jax.lax.axis_index(split)
  over_vocabulary = lambda reduce, a: reduce(a, split) if split else a
  # Not take_along_axis: a device holds the target's logit or it does not.
  hit_NV = targets_N[:, None] == first + jnp.arange(rows)
  highest_N = over_vocabulary(jax.lax.pmax, logits_NV.max(-1))
  exp_NV = jnp.exp(logits_NV - highest_N[:, None])
  total_N, target_N, sum_N = over_vocabulary(
    jax.lax.psum, (exp_NV.sum(-1), jnp.where(hit_NV, logits_NV, 0).sum(-1), logits_NV.sum(-1))
  )
  logsumexp_N = highest_N + jnp.log(total_N)
  nll_N = logsumexp_N - target_N
  z_N = z_loss * logsumexp_N**2
  tokens = {
    "loss": nll_N + label_smoothing * (target_N - sum_N / V) + z_N,
    "nll": nll_N,
    "z_loss": z_N,
    "correct": target_N >= highest_N,
  }
  sums = {name: (weights_N * value_N).sum() for name, value_N in tokens.items()}
  p_NV = exp_NV * ((1 + 2 * z_loss * logsumexp_N) / total_N)[:, None]
  wanted_NV = (1 - label_smoothing) * hit_NV + label_smoothing / V
  return sums, weights_N * nll_N, weights_N[:, None] * (p_NV - wanted_NV)


def _product(dims: str, a, b) -> jax.Array:
  return jnp.einsum(dims, a, b, preferred_element_type=raised(a.dtype))


def _split(a_N, chunks):
  """(tokens, ...) -> (chunks, N, ...); zeros, so of weight 0, fill the last chunk."""
  a_N = jnp.pad(a_N, ((0, -len(a_N) % chunks),) + ((0, 0),) * (a_N.ndim - 1))
  return a_N.reshape(chunks, -1, *a_N.shape[1:])


def _varying(a) -> frozenset[str]:
  """The manual axes over which the devices' values differ."""
  return jax.typeof(a).mat.varying


def _vocabulary_axes(table_VD) -> tuple[str, ...]:
  """The axes that really split the table's rows."""
  split = lambda axis: axis in _varying(table_VD) and jax.lax.axis_size(axis) > 1
  return tuple(filter(split, axes("V")))


def _typed_as(gradient, primal):
  """Sums a gradient, in the primal's dtype, over the devices that share the primal.

  Where the primal is typed as reduced, that sum is left to what gathered it.
  """
  gradient, later = gradient.astype(primal.dtype), jax.typeof(primal).mat.reduced
  gradient = jax.lax.psum(gradient, ordered(_varying(gradient) - _varying(primal) - later))
  return jax.lax.pcast(gradient, ordered(later), to="unreduced")
