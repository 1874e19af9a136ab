"""The quickstart's decoder and its training step in plain jax: what overhead.py compares with.

Nothing but arrays in dicts, one function for the loss and one for the update: no modules, no
optimizer library, no settings. Rotary positions, normalised queries and keys, squared ReLU, tied
embedding; AdamW after clipping, with a linear schedule. It computes what bigtrain computes
(tests/test_benchmarks.py compares losses), in the layout that is fastest: matrices of all tokens
for the products with weights, heads before positions in attention, layers unrolled.

Dims: B batch, T query position, S key position, N all B*T tokens, D model, K heads, H head, h half
of the head, F hidden, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bigtrain.experiment import Experiment
from bigtrain.leaves import flatten

EPS, THETA = 1e-6, 10_000.0


def parameters(model: Any) -> dict[str, Any]:
  """Copies of the weights of bigtrain's model, by layer."""
  flat, stacked = {}, {}
  for path, value in flatten(model).items():
    (stacked if path.startswith("transformer") else flat)[path.split("segments.0.0.")[-1]] = value
  layers = len(next(iter(stacked.values())))
  at = lambda i: {path: jnp.array(value[i]) for path, value in stacked.items()}
  return {path: jnp.array(v) for path, v in flat.items()} | {"layers": [*map(at, range(layers))]}


def loss(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
  """The mean cross-entropy of the batch's weighted targets."""
  B, T = batch["tokens"].shape
  positions_BT, segments_BT = batch["positions"], batch["segments"]
  mask_BTS = positions_BT[:, :, None] >= positions_BT[:, None, :]
  mask_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
  angles_BTh = rotations(positions_BT, params["layers"][0]["attention.q_DKGH"].shape[-1])
  x_ND = params["embed_VD"][batch["tokens"].reshape(B * T)]
  for p in params["layers"]:
    D = x_ND.shape[-1]
    h_ND = norm(x_ND, p["attention_norm.scale_D"])
    q, k, v = (
      (h_ND @ p[f"attention.{name}"].reshape(D, -1)).reshape(B, T, -1, angles_BTh.shape[-1] * 2)
      for name in ("q_DKGH", "k_DKH", "v_DKH")
    )
    q_BKTH = rotate(norm(q, p["attention.q_norm.scale_D"]), angles_BTh)
    k_BKSH = rotate(norm(k, p["attention.k_norm.scale_D"]), angles_BTh)
    score_BKTS = (q_BKTH * q_BKTH.shape[-1] ** -0.5) @ k_BKSH.swapaxes(2, 3)
    prob_BKTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], score_BKTS, -1e30))
    y_BTKH = (prob_BKTS @ v.swapaxes(1, 2)).swapaxes(1, 2)
    x_ND += y_BTKH.reshape(B * T, -1) @ p["attention.o_KGHD"].reshape(-1, D)
    h_ND = norm(x_ND, p["feed_forward_norm.scale_D"])
    x_ND += jnp.square(jax.nn.relu(h_ND @ p["feed_forward.up_DF"])) @ p["feed_forward.down_FD"]
  logits_NV = norm(x_ND, params["norm.scale_D"]) @ params["embed_VD"].T
  target_N = jnp.take_along_axis(logits_NV, batch["targets"].reshape(-1, 1), axis=1)[:, 0]
  nll_N = jax.nn.logsumexp(logits_NV, axis=1) - target_N
  weights_N = batch["weights"].reshape(-1)
  return (weights_N * nll_N).sum() / weights_N.sum()


def norm(x, scale_D):
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale_D


def rotations(positions_BT, head_dim: int):
  freq_h = THETA ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return positions_BT[:, :, None] * freq_h


def rotate(x_BTKH, angles_BTh):
  """Turns the pairs of the last dim, and puts heads before positions."""
  cos, sin = jnp.cos(angles_BTh)[:, None], jnp.sin(angles_BTh)[:, None]
  a, b = jnp.split(x_BTKH.swapaxes(1, 2), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def start(params: dict[str, Any]) -> tuple:
  """The state before the first update: its number, weights, and Adam's two moments."""
  zeros = lambda: jax.tree.map(jnp.zeros_like, params)
  return jnp.zeros((), jnp.int32), params, zeros(), zeros()


def make_step(e: Experiment):
  """The jitted update `(state, batch) -> (state, loss)`; it donates the state."""
  o: Any = e.optimizer

  def step(state, batch):
    number, params, mean, square = state
    value, gradient = jax.value_and_grad(loss)(params, batch)
    total = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    clip = jnp.minimum(1.0, o.clip / total)
    rise = jnp.minimum(1.0, (number + 1) / o.schedule.warmup)
    rate = o.lr * rise * jnp.clip((e.steps - number) / (e.steps - o.schedule.warmup), 0.0, 1.0)
    number += 1

    def update(path, w, g, m, v):
      m = o.b1 * m + (1 - o.b1) * clip * g
      v = o.b2 * v + (1 - o.b2) * (clip * g) ** 2
      move = m / (1 - o.b1**number) / (jnp.sqrt(v / (1 - o.b2**number)) + o.eps)
      decay = 0.0 if "scale" in jax.tree_util.keystr(path) else o.weight_decay
      return w - rate * (move + decay * w), m, v

    updated = jax.tree_util.tree_map_with_path(update, params, gradient, mean, square)
    triple = jax.tree.structure((0, 0, 0))
    return (number, *jax.tree.transpose(jax.tree.structure(params), triple, updated)), value

  return jax.jit(step, donate_argnums=0)
