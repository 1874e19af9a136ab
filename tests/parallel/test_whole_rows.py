"""On a mesh that cuts rows, what is called by hand and what is sampled has rows of any length."""

import jax
import numpy as np

from bigtrain.generate import Sampling, generate
from bigtrain.mesh import Mesh
from tests import packed

MESH = Mesh(fsdp=2, context=2, tensor=2, sequence=True)


def test_logits_and_samples_of_odd_rows_equal_those_of_one_device():
  e = packed.experiment(attention={"dropout": 0.0})
  state = packed.start(e)
  tokens_BT = np.random.default_rng(0).integers(0, packed.V, (4, 7))
  call = jax.jit(lambda model, tokens_BT: model(tokens_BT))
  sample = lambda model: generate(model, list(tokens_BT[:2, :3]), 4, Sampling(temperature=0))
  wanted, wanted_samples = call(state.model, tokens_BT), sample(state.model)
  with jax.set_mesh(mesh := MESH.make()):
    place = jax.tree.map(lambda x: x.sharding, packed.Program(e, mesh).abstract().model)
    model = jax.device_put(state.model, place)
    got, samples = call(model, tokens_BT), sample(model)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(samples, wanted_samples)
