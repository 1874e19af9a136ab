"""Single layers over rows that are cut equal those of one device: outputs, gradients and reports.

Each case stands for a fault that whole models showed first, which are slow to compile.

Dims: B batch, T position, D model, C class.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigtrain import sharding, taps
from bigtrain.kernels.attention import Tokens
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig, Memory
from bigtrain.models.initial import Initializer, Normal
from bigtrain.models.latent_attention import LatentAttentionConfig
from bigtrain.models.moe import BalanceLoss, MoEConfig, RouterConfig
from bigtrain.parallel import context
from bigtrain.precision import project
from tests import packed

B, T, D, HEADS, C = 8, 16, 16, 4, 24
INIT = Initializer(Normal(std=0.3), layers=2)
ROUTER = RouterConfig(z_loss=0.1, balance_loss=BalanceLoss(factor=0.1))
MOE = MoEConfig(experts=4, top_k=2, hidden=12, shared=8, router=ROUTER)
LATENT = LatentAttentionConfig(
  heads=HEADS, q_rank=8, kv_rank=8, head_dim=6, rotary_dim=4, value_dim=6
)


def experts(key):
  layer = MOE.make(D, INIT, key)
  return layer, lambda layer, x_BTD, tokens: layer(x_BTD, tokens=tokens)


def latent_attention(key):
  layer = LATENT.make(D, INIT, key)
  return layer, lambda layer, x_BTD, tokens: layer(x_BTD, tokens)[0]


def attention_to_a_memory(key):
  layer = AttentionConfig(heads=HEADS).make(D, INIT, key)
  return layer, lambda layer, x_BTD, tokens: layer.across(x_BTD, tokens, Memory(tokens, x_BTD))


def product_with_the_first_column(key):
  weight_DC = INIT.weight(key, "DC", {"D": D, "C": C}, fan_in="D")
  return weight_DC, lambda w, x_BTD, _: project("BD,DC->BC", context.first(x_BTD), w)


SEQUENCE = {"tensor": 2, "sequence": True}
CASES = [
  (experts, Mesh(fsdp=1, expert=2, context=2, **SEQUENCE)),
  (latent_attention, Mesh(fsdp=2, context=2, **SEQUENCE)),
  (attention_to_a_memory, Mesh(fsdp=2, context=2, ulysses=True, **SEQUENCE)),
  (product_with_the_first_column, Mesh(fsdp=4, context=2)),
]


def run(make, batch):
  """The loss, the gradient, and what is reported, of statistics and of sums."""
  layer, call = make(jax.random.key(0))

  def loss(layer):
    with context.cut(batch) as cut:
      tokens = Tokens(cut["positions"], cut["segments"])
      x_BTD = jnp.sin(cut["tokens"][..., None] * jnp.linspace(0.1, 1, D))
      y = call(layer, sharding.lay(x_BTD, "BTD"), tokens)
      if y.ndim == 3:  # What padding sees means nothing.
        y *= sharding.lay(cut["weights"][..., None], "BTD")
      rows_B = jnp.arange(1, B + 1).reshape(B, *(1,) * (y.ndim - 1))
      return (jnp.sin(y) * rows_B).sum()

  def of_all(layer):
    (value, sums), statistics = taps.collect(taps.collect(loss, sums=True))(layer)
    added = sum(x.sum() for name, x in sums.items() if name.startswith(taps.OF_ROWS))
    return value + added, (value, sums, taps.values(statistics))

  gradient, found = jax.grad(of_all, has_aux=True)(layer)
  return nnx.to_pure_dict(nnx.state(gradient)) if isinstance(layer, nnx.Module) else gradient, found


@pytest.mark.parametrize(("make", "mesh"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_a_layer_finds_what_one_device_finds(make, mesh):
  batch = packed.Packed(seq=T).make(0).batch(0, B)
  wanted = jax.jit(lambda batch: run(make, batch))(batch)
  with jax.set_mesh(mesh.make()):
    laid = jax.device_put(batch, sharding.batch_sharding())
    got = jax.jit(lambda batch: run(make, batch))(laid)
  # No device of a ring sees all scores of a query: it reports none.
  wanted[1][2].update({k: got[1][2].get(k) for k in wanted[1][2].keys() - got[1][2].keys()})
  distances = packed.distances(*jax.device_get((got, wanted)))
  assert {k: d for k, d in distances.items() if not d <= 1e-5} == {}
  assert len(distances) > 1 and np.linalg.norm(jax.tree.leaves(wanted[0])[0]) > 1e-3
