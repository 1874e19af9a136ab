"""What is computed in another form on TPUs is the same there: those forms, on virtual devices.

They are chosen by platform, and the gate's devices are CPUs. Here the modules that choose are told
that these are TPUs; kernels that run on TPUs alone stay out (tests/kernels has them).
"""

import dataclasses
import types
from collections import Counter

import pytest

from bigtrain import precision
from bigtrain.data.text import TextData
from bigtrain.kernels import fence, grouped
from bigtrain.mesh import Mesh
from bigtrain.models import position
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.position import Rotary
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.parity import shrink
from tests import families

MESH = Mesh(fsdp=2, tensor=2, sequence=True)


def forms_of_tpus(monkeypatch) -> Counter:
  """How often each of the modules has asked from now on, and heard of a TPU."""
  asked = Counter()

  def platform(name):
    def tpu():
      asked[name] += 1
      return "tpu"

    return tpu

  for module in (precision, position, grouped):
    monkeypatch.setattr(module, "platform", platform(module.__name__))
  chip = types.SimpleNamespace(platform=platform(fence.__name__), device_kind=lambda: "TPU v5")
  monkeypatch.setattr(fence, "mesh", chip)
  monkeypatch.setattr(fence, "SMALLER", 1)  # Bytes, which every weight crowds.
  return asked


def assert_equal(e, asked: Counter, modules) -> None:
  report = families.check(e)
  assert report.equal, report.verdict()
  assert asked.keys() == {module.__name__ for module in modules}
  assert {t.kind for t in report.tensors} >= {"output", "loss", "gradient", "update"}


def test_biases_rotations_and_fences_of_tpus_equal_one_device(monkeypatch):
  attention = AttentionConfig(heads=4, kv_heads=2, rotary=Rotary(), bias=True, out_bias=True)
  feed_forward = FeedForwardConfig(hidden=64, gated=True, bias=True)
  block = BlockConfig(attention=attention, feed_forward=feed_forward)
  model = LanguageModelConfig(vocab=128, dim=32, layers=2, pattern=(block,), remat="none")
  e = shrink(families.study(model, TextData(), CausalLM(), "sgd", mesh=MESH))
  e = dataclasses.replace(e, steps=2, batch=families.BATCH)
  families.reference(e)  # In the forms of a CPU.
  asked = forms_of_tpus(monkeypatch)
  assert_equal(e, asked, (precision, position, fence))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"tensor": 2}], ids=["fsdp", "tensor"])
def test_grouped_products_of_tpus_equal_one_device(axes, monkeypatch):
  e = families.small("moe", Mesh(**{"fsdp": 1, "expert": 2} | axes))
  families.reference(e)
  asked = forms_of_tpus(monkeypatch)
  assert_equal(e, asked, (precision, position, fence, grouped))
