"""A product and its bias, as each platform makes them, against the formula.

Dims: B batch, T position, D model, F hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import precision, sharding
from bigtrain.mesh import Mesh
from bigtrain.precision import project

B, T, D, F = 8, 4, 16, 24


@pytest.mark.parametrize(
  "mesh",
  [
    Mesh(fsdp=4, tensor=2),
    Mesh(data=2, fsdp=2, context=2),
    Mesh(fsdp=4, tensor=2, sequence=True),
  ],
  ids=str,
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_product_with_a_bias_and_its_gradients(platform, mesh, monkeypatch):
  monkeypatch.setattr(precision, "platform", lambda: platform)
  r = np.random.default_rng(0)
  x_BTD, w_DF, b_F, c_BTF = (
    r.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, F), F, (B, T, F))
  )
  with jax.set_mesh(mesh.make(jax.devices())), sharding.rows(cut=mesh.context > 1 or mesh.sequence):
    here = jax.sharding.get_mesh()
    put = lambda a, spec: jax.device_put(a, jax.sharding.NamedSharding(here, spec))
    stored = put(w_DF, sharding.weight("DF")), put(b_F, sharding.act("F"))

    def loss(stored, x_BTD, c_BTF):
      y_BTF = project("BTD,DF->BTF", sharding.shared(x_BTD), *map(jnp.asarray, stored))
      return (y_BTF * c_BTF).sum(), y_BTF

    step = jax.jit(jax.grad(loss, has_aux=True))
    found, y_BTF = step(stored, put(x_BTD, sharding.act("BTD")), put(c_BTF, sharding.act("BTF")))
  np.testing.assert_allclose(y_BTF, x_BTD @ w_DF + b_F, rtol=1e-4, atol=1e-5)
  want = np.einsum("btd,btf->df", x_BTD, c_BTF), c_BTF.sum((0, 1))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
