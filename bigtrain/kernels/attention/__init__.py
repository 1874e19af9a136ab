"""The one attention function, and what computes it: one file a kernel, `plain` the reference.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head, P
distance: of a query and a key, T + S - 1 of them.
"""

import jax

from bigtrain import mesh, sharding
from bigtrain.config import Refused
from bigtrain.kernels.attention import blockwise, cudnn, plain, splash, statistics, tokamax
from bigtrain.kernels.attention.call import Call, Form, Kernel, Tokens, named, visible

__all__ = ["Form", "Kernel", "Tokens", "attend", "kernel_of", "refuse", "visible"]

KERNELS = {
  "plain": plain,
  "blockwise": blockwise,
  "splash": splash,
  "cudnn": cudnn,
  "tokamax": tokamax,
}
# What "auto" takes: the first that can serve.
BEST = {"cpu": (blockwise,), "gpu": (cudnn, blockwise), "tpu": (splash, blockwise)}
FEW = 64  # Queries up to which "auto" takes the plain form: no block of scores would be left out.


def attend(
  q_BTKGH,
  k_BSKH,
  v_BSKH,
  queries: Tokens,
  keys: Tokens,
  form: Form,
  *,
  bias_KGP=None,
  dropout=0.0,
  key=None,
) -> jax.Array:
  """Softmax attention; scores and softmax in float32. Returns (B, T, K, G, H) in the dtype of `v`.

  Queries come scaled. `bias_KGP` is added by distance, after a soft cap: entry p to the score of
  column s for the query in column t = s - p + T - 1. It is a vector for each head, so that a kernel
  that goes through the scores block by block needs no array of their size.

  The inputs have the checkpoint names "q", "k" and "v", each as its kernel lays it out; the output,
  with what else a kernel needs for its backward pass, has "attention". What a
  query gets that sees nothing is finite, and no more is promised of it.

  Raises:
    Refused: the kernel that `form` names cannot compute this.
  """
  if sharding.rows_are_cut():
    from bigtrain.parallel import context  # Which calls this in turn.

    extras = {"bias_KGP": bias_KGP, "dropout": dropout, "key": key}
    return context.attend(*named(q_BTKGH, k_BSKH, v_BSKH), queries, keys, form, **extras)
  dropped = {"dropout": dropout, "key": key} if dropout and key is not None else {}
  call = Call(q_BTKGH, k_BSKH, v_BSKH, queries, keys, form, bias_KGP, **dropped)
  statistics.report(call)
  kernel = kernel_of(call)
  inside = bool(jax.sharding.get_abstract_mesh().manual_axes)  # They have names outside, then.
  if kernel is not splash and not inside:
    q_BTKGH, k_BSKH, v_BSKH = named(q_BTKGH, k_BSKH, v_BSKH)
    call = call._replace(q_BTKGH=q_BTKGH, k_BSKH=k_BSKH, v_BSKH=v_BSKH)
  return kernel.attend(call)


def refuse(form: Form, dropout: float) -> None:
  """Refuses a kernel that never computes this form, or not with dropout."""
  if form.kernel != "auto" and (cause := KERNELS[form.kernel].limit(form, dropout)):
    raise Refused(_message(form.kernel, cause))


def kernel_of(call: Call):
  """The module that answers a call."""
  if call.form.kernel != "auto":
    kernel = KERNELS[call.form.kernel]
    if cause := kernel.limit(call.form, call.dropout) or kernel.unfit(call):
      raise Refused(_message(call.form.kernel, cause))
    return kernel
  if call.q_BTKGH.shape[1] <= FEW:
    return plain
  fits = lambda kernel: not (kernel.limit(call.form, call.dropout) or kernel.unfit(call))
  return next(filter(fits, BEST[mesh.platform()]), plain)


def _message(name: str, cause: str) -> str:
  return f"attention: kernel {name!r} cannot serve here: {cause}; set it to 'auto'"
