"""The one attention function, and what computes it: one file a kernel, `plain` the reference.

Dims: B batch, T query position, S key position, K kv heads, G queries per kv head, H head, P
distance: of a query and a key, T + S - 1 of them.
"""

import jax

from bigtrain import mesh, sharding
from bigtrain.config import Refused
from bigtrain.kernels.attention import blockwise, cudnn, plain, splash, statistics, tokamax
from bigtrain.kernels.attention.call import Call, Form, Kernel, Tokens, named, visible

__all__ = ["Call", "Form", "Kernel", "Tokens", "attend", "kernel_of", "refuse", "visible"]

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


def attend(call: Call) -> jax.Array:
  """Softmax attention; scores and softmax in float32. Returns (B, T, K, G, H) in the dtype of `v`.

  The inputs have the checkpoint names "q", "k" and "v", each as its kernel lays it out; the output,
  with what else a kernel needs for its backward pass, has "attention". What a query gets that sees
  nothing is finite, and no more is promised of it.

  Raises:
    Refused: the kernel that `call.form` names cannot compute this.
  """
  if not call.dropout or call.key is None:
    call = call._replace(dropout=0.0, key=None)
  if sharding.rows_are_cut():
    from bigtrain.parallel import context  # Which calls this in turn.

    return context.attend(_named(call))
  statistics.report(call)
  kernel = kernel_of(call)
  inside = bool(jax.sharding.get_abstract_mesh().manual_axes)  # They have names outside, then.
  return kernel.attend(call if kernel is splash or inside else _named(call))


def _named(call: Call) -> Call:
  q_BTKGH, k_BSKH, v_BSKH = named(call.q_BTKGH, call.k_BSKH, call.v_BSKH)
  return call._replace(q_BTKGH=q_BTKGH, k_BSKH=k_BSKH, v_BSKH=v_BSKH)


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
