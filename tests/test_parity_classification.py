"""Five steps of classifiers on a mesh equal those of a single device: mixtures, dropout and all."""

import pytest

from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.norm import LayerNormConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import AttentionPoolConfig, ViTConfig
from bigtrain.validate import validate
from tests import classes, packed

PIXELS = classes.R * classes.S * classes.CHANNELS
MODELS = {
  "mlp": MLPConfig(
    inputs=PIXELS,
    hidden=(16, 24, 24),
    classes=classes.C,
    activation="prelu",
    norm=LayerNormConfig(),
    residual=True,
    dropout=0.1,
    dtype="float32",
  ),
  "vit": ViTConfig(
    image=classes.R,
    channels=classes.CHANNELS,
    patch=4,
    classes=classes.C,
    pool=AttentionPoolConfig(heads=8, hidden=24, bias=False),
    dim=32,
    layers=2,
    pattern=(
      BlockConfig(
        # Without biases: that of the keys has no gradient but rounding, which Adam would enlarge.
        attention=AttentionConfig(heads=8, causal=False),
        feed_forward=FeedForwardConfig(hidden=40, bias=True),
      ),
    ),
    drop_path=0.3,
    dropout=0.1,
    dtype="float32",
  ),
}
MESHES = (Mesh(fsdp=1, tensor=8), Mesh(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module", params=MODELS)
def alone(request):
  """The model, the first state, and its five steps on a single device."""
  e = classes.experiment(MODELS[request.param])
  state = packed.start(e)
  return e.model, state, packed.run(e, state, meshed=False)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data},{m.fsdp},{m.tensor}")
def test_five_steps_equal_a_single_device(alone, mesh):
  model, state, (wanted, wanted_metrics) = alone
  e = classes.experiment(model, mesh=mesh)
  validate(e, devices=8)
  got, metrics = packed.run(e, state)
  distances = packed.distances(
    (got.model, got.optimizer, metrics), (wanted.model, wanted.optimizer, wanted_metrics)
  )
  assert {k: d for k, d in distances.items() if not d <= 1e-5} == {}


def test_the_runs_that_are_compared_learn(alone):
  model, state, _ = alone
  e = classes.calm(model)
  _, metrics = packed.run(e, state, meshed=False)
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
