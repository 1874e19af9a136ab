"""muP: the deviation and the rate of every weight, by the paper's table, and what has no rule."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from bigtrain.config import Refused, config
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.initial import Initializer, Mup, Normal
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.norm import RMSNormConfig
from bigtrain.models.position import Learned
from bigtrain.models.transformer import BlockConfig
from bigtrain.optim.adafactor import Adafactor
from bigtrain.optim.adam import AdEMAMix, NAdam
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.lamb import LAMB
from bigtrain.optim.lion import Lion
from bigtrain.optim.muon import Muon
from bigtrain.optim.optimizer import Optimizer
from bigtrain.optim.rms import Adagrad, RMSProp
from bigtrain.optim.schedule import Constant
from bigtrain.optim.schedule_free import ScheduleFreeAdamW
from bigtrain.optim.sgd import SGD
from bigtrain.optim.soap import SOAP
from bigtrain.validate import validate
from tests import packed
from tests.models.build import filled
from tests.widths import AT_BASE, decoder, dense, mup

# The table: (deviation of the first weights, factor of Adam's rate, of SGD's), for a model of
# ratio m whose heads are h times as wide. A bias or a scale has no deviation.

M, HEADS_GREW = 4.0, 2.0
N = 1 / 8  # What FanIn gives a weight whose inputs have the base's width, 64.
HIDDEN, TABLE = (N / M**0.5, 1 / M, 1.0), (N, 1.0, M)
VECTOR = (0.0, 1.0, M)
TABLE_8 = {
  "embed_VD": TABLE,
  "position_TD": TABLE,
  "output_table_VD": TABLE,
  "attention.q_DKGH": HIDDEN,
  "attention.k_DKH": HIDDEN,
  "attention.v_DKH": HIDDEN,
  "attention.o_KGHD": (N / M**0.5 / 2, 1 / M, 1.0),  # Scaled by 1 / sqrt(2 layers).
  "attention.q_bias_KGH": VECTOR,
  "attention.k_bias_KH": VECTOR,
  "attention.v_bias_KH": VECTOR,
  "attention.o_bias_D": VECTOR,
  "attention.q_norm.scale_D": (0.0, 1.0, HEADS_GREW),
  "attention.k_norm.scale_D": (0.0, 1.0, HEADS_GREW),
  "feed_forward.up_DF": HIDDEN,
  "feed_forward.gate_DF": HIDDEN,
  "feed_forward.down_FD": (N / M**0.5 / 2 / 2**0.5, 1 / M, 1.0),  # From twice the base's width.
  "feed_forward.up_bias_F": VECTOR,
  "feed_forward.gate_bias_F": VECTOR,
  "feed_forward.down_bias_D": VECTOR,
  "feed_forward.activation.negative_scale_F": VECTOR,
  "attention_norm.scale_D": VECTOR,
  "feed_forward_norm.scale_D": VECTOR,
  "norm.scale_D": VECTOR,
}


def whole(dim):
  """A decoder with every kind of parameter: ratio 4, heads twice as wide and twice as many."""
  heads = {"heads": 4, "kv_heads": 2, "head_dim": dim // 4, "bias": True, "out_bias": True}
  block = BlockConfig(
    attention=AttentionConfig(**heads, qk_norm=RMSNormConfig()),
    feed_forward=FeedForwardConfig(hidden=2 * dim, gated=True, bias=True, activation="prelu"),
  )
  return LanguageModelConfig(
    vocab=64,
    dim=dim,
    layers=2,
    pattern=(block,),
    position=Learned(length=64),
    tied=False,
    init=Mup(base=dim // 4, head_dim=dim // 8, at_base=AT_BASE),
  )


def named(tree):
  """Leaves by name, without the place in the stack."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  short = lambda path: name(path).removeprefix("transformer.segments.0.0.").removesuffix(".value")
  return {short(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def test_first_weights_have_the_deviations_of_the_table():
  (c := whole(256)).check()
  found = named(jax.jit(c.make)(jax.random.key(0)))
  assert found.keys() == TABLE_8.keys()
  for name, (deviation, _, _) in TABLE_8.items():
    assert found[name].std() == pytest.approx(deviation, rel=0.03), name


def first_updates(*optimizers):
  """Of each optimizer, by name: with the width of a model, and without."""
  c = whole(16)
  model, gradient = filled(c.make), filled(c.make, scale=1e-3, seed=1)

  @jax.jit
  def all_of_them(model, gradient):
    transformations = [o.make(1, width) for o in optimizers for width in (c.width(), None)]
    return [tx.update(gradient, tx.init(model), model)[0] for tx in transformations]

  return [named(updates) for updates in all_of_them(model, gradient)]


RULES = {
  1: [
    AdamW(lr=1e-3, weight_decay=0.2),
    NAdam(lr=1e-3),
    AdEMAMix(lr=1e-3, weight_decay=0.2),
    Lion(lr=1e-3, weight_decay=0.2),
    RMSProp(lr=1e-3),
    Adagrad(lr=1e-3),
    Adafactor(lr=1e-3, least=None),
    ScheduleFreeAdamW(lr=1.0),  # Its updates are differences of weights, and as exact as these.
  ],
  2: [SGD(lr=0.1, weight_decay=0.1)],
}


@pytest.mark.parametrize(
  ("column", "optimizer"),
  [(column, o) for column, optimizers in RULES.items() for o in optimizers],
  ids=lambda x: type(x).__name__ if isinstance(x, Optimizer) else "",
)
def test_updates_have_the_factors_of_the_table_and_decay_has_none(column, optimizer):
  optimizer = dataclasses.replace(optimizer, clip=None, schedule=Constant())
  plain = dataclasses.replace(optimizer, weight_decay=0.0)
  one, standard, decayed, with_decay = first_updates(plain, optimizer)
  for name, row in TABLE_8.items():
    wanted = row[column] * standard[name]
    np.testing.assert_allclose(one[name], wanted, rtol=1e-4, atol=1e-8, err_msg=name)
    decay = with_decay[name] - standard[name]
    np.testing.assert_allclose(decayed[name] - one[name], decay, rtol=1e-3, atol=5e-7)


@pytest.mark.parametrize(("scale", "factor"), [("spectral", 1.0), ("rms", M**-0.5)])
def test_muon_scales_orthogonal_updates_by_its_own_rule_and_the_rest_by_adams(scale, factor):
  fields = {"spared": "embed|position|table|up_DF", "clip": None, "schedule": Constant()}
  one, standard = first_updates(Muon(lr=0.01, scale=scale, iterations=1, **fields))
  for name, (_, adam, _) in TABLE_8.items():
    orthogonal = adam == 1 / M and "up_DF" not in name
    wanted = (factor if orthogonal else adam) * standard[name]
    np.testing.assert_allclose(one[name], wanted, rtol=1e-4, atol=1e-8, err_msg=name)


# What is refused.


@config
class Own(Optimizer):
  def direction(self):
    return optax.identity()


@pytest.mark.parametrize(
  ("optimizer", "message"),
  [
    (Own(lr=0.1), "no rule for Own with Mup; take AdamW.*`width_rule`"),
    (LAMB(lr=0.1), "LAMB has no rule"),
    (SOAP(lr=0.1), "SOAP has no rule"),
    (Adafactor(lr=0.1), "least must be None"),
    (Adagrad(lr=0.1, start=0.1), "start must be 0"),
    (AdamW(lr=0.1, clip_value=1.0), "clip_value does not hold"),
    (SGD(lr=0.1, clip_unit=0.1), "clip_unit does not hold"),
  ],
)
def test_an_optimizer_without_a_rule_is_refused_before_any_device_work(optimizer, message):
  init = Mup(base=packed.D, head_dim=packed.H)
  e = packed.experiment(model={"init": init}, optimizer=optimizer)
  with pytest.raises(Refused, match=message):
    validate(e)
  validate(packed.experiment(optimizer=optimizer))


def test_muon_refuses_a_matrix_of_which_one_side_grows():
  c = dense(128, mup())
  tx = Muon(lr=0.1).make(1, c.width())
  model = jax.eval_shape(c.make, jax.random.key(0))
  state = jax.eval_shape(tx.init, model)
  with pytest.raises(Refused, match=r"one side of \.layers\[0\]\.weight.*`spared`"):
    jax.eval_shape(tx.update, model, state, model)


@pytest.mark.parametrize(
  ("c", "message"),
  [
    (decoder(128, Mup(base=64)), "needs the base's head_dim"),
    (decoder(128, Mup(base=64, head_dim=24)), r"heads \* head_dim is 128.* no multiple of 24"),
    (decoder(128, mup(), hidden=99), r"hidden is 99, so at the base of 64 it would be 49.5"),
    (MLPConfig(inputs=4, hidden=(64,), classes=2, init=mup()), "no heads; set its Mup's head_dim"),
    (
      MLPConfig(inputs=4, hidden=(64, 33), classes=2, init=Mup(base=32)),
      r"hidden.1 is 33, so at the base of 32 it would be 16.5",
    ),
  ],
)
def test_a_model_that_cannot_have_grown_from_the_base_is_refused(c, message):
  with pytest.raises(Refused, match=message):
    c.check()


def test_a_model_that_was_written_without_it_refuses_mup():
  with pytest.raises(Refused, match="no rules for Mup"):
    Initializer(Mup(base=64), 1)
  assert Initializer(Normal(), 1).width is None
  with pytest.raises(Refused, match="base is 0"):
    Mup(base=0).check()
