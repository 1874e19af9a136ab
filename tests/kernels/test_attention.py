"""Which kernel computes attention, and that those of other projects are asked rightly."""

import importlib.util
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import partial_eval

from bigtrain import mesh, sharding, taps
from bigtrain.config import Refused
from bigtrain.kernels.attention import (
  Form,
  Tokens,
  attend,
  blockwise,
  cudnn,
  kernel_of,
  plain,
  splash,
  tokamax,
)
from bigtrain.kernels.attention.call import Call
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from tests.kernels import attention
from tests.kernels.attention import FORMS, distances, exact, gradients

pick = lambda *names: pytest.mark.parametrize("form", names)


@pick(*FORMS)
def test_the_plain_form_equals_the_formula(form):
  c = attention.call(FORMS[form], 14, bias=form != "causal")
  assert max(distances(gradients(plain.attend, c), exact(c))) < 2e-6


@pick("causal", "window", "window both ways", "soft cap")
def test_splash_equals_the_formula(form, monkeypatch):
  """In interpret mode, over two blocks of queries and of keys."""
  monkeypatch.setattr(splash, "BLOCKS", (128,))
  monkeypatch.setattr(splash, "KEYS", 128)
  c = attention.call(FORMS[form], 256, rows=1)
  monkeypatch.setattr(splash, "FUSED", 0 if form == "causal" else 256)
  got = gradients(lambda c: splash.attend(c, interpret=True), c)
  assert max(distances(got, exact(c))) < 2e-6


def test_splash_runs_its_forward_kernel_once_where_its_results_are_kept():
  c = attention.call(FORMS["causal"], 128, rows=1)

  def kernels(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    attend = lambda q: splash.attend(c._replace(q_BTKGH=q), interpret=True).sum()
    made = jax.make_jaxpr(jax.value_and_grad(jax.checkpoint(attend, policy=policy)))(c.q_BTKGH)
    used, _ = partial_eval.dce_jaxpr(made.jaxpr, [True, True])
    return str(used).count("pallas_call[")

  assert (kernels(), kernels("attention")) == (3, 2)


@pytest.mark.parametrize(
  ("T", "kernels"),
  # 512 by 16, by 15, and 128 by 7 * 7, by 61; forward and backward.
  [(8192, 1 + 4), (7680, 1 + 5), (6272, 1 + 7), (7808, 1 + 2)],
)
def test_rows_of_any_length_take_few_kernels(T, kernels):
  c = call_of(FORMS["causal"], T)
  attend = lambda *arrays: splash.attend(Call(*arrays, *c[3:]), interpret=True).sum()
  made = jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(*c[:3])
  assert str(made).count("pallas_call[") == kernels


@pytest.mark.tpu
@pytest.mark.parametrize("window", [None, 100])
def test_splash_compiles_for_a_tpu_without_communication(window, monkeypatch):
  pytest.importorskip("libtpu")
  from jax.experimental import topologies

  for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    monkeypatch.setenv(name, "1")
  devices = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices
  form = Form(causal=True, window=window, aligned=True)
  with jax.set_mesh(slice_ := Mesh(fsdp=2, tensor=2).make([*devices])):

    def shape(dims, dtype, *sizes):
      place = jax.NamedSharding(slice_, sharding.act(dims))
      return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def run(q, k, v, segments, dout):
      tokens = Tokens(segments, segments)
      out, pull = jax.vjp(lambda *a: attend(Call(*a, tokens, tokens, form)), q, k, v)
      return out, pull(dout)

    q = shape("BTKGH", jnp.bfloat16, 4, 512, 2, 4, 64)
    k = shape("BSKH", jnp.bfloat16, 4, 512, 2, 64)
    lowered = jax.jit(run).lower(q, k, k, shape("BT", jnp.int32, 4, 512), q)
    text = lowered.compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


@pick("causal", "both ways", "window")
@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_is_asked_what_the_formula_says(form, packed):
  """What it is asked, answered by jax.nn's own implementation."""
  c = attention.call(FORMS[form], 14)
  if not packed:
    whole = Tokens(np.broadcast_to(np.int32(np.arange(14)), c.queries.positions.shape))
    c = c._replace(queries=whole, keys=whole)
  got = gradients(lambda c: cudnn.attend(c, implementation="xla"), c)
  assert max(distances(got, exact(c))) < 2e-6


@pick("causal", "window")
def test_cudnn_takes_these_arguments(form):
  """Lowered for CUDA, as far as a machine without it goes: jax checks the shapes and the form."""
  from jax._src.cudnn import fused_attention_stablehlo as library

  c = attention.call(FORMS[form], 14, dtype=jnp.bfloat16)
  run = lambda q: jax.grad(lambda q: cudnn.attend(c._replace(q_BTKGH=q)).sum().astype("f4"))(q)
  there = mock.patch.multiple(
    library,
    check_cudnn_version=lambda: 91000,
    check_compute_capability=lambda capability: True,
    is_cuda_compute_capability_equal=lambda capability: False,
  )
  with there:
    text = jax.jit(run).trace(c.q_BTKGH).lower(lowering_platforms=("cuda",)).as_text()
  assert "cudnn$fmhaScaleBiasSoftmax" in text and "cudnn$fmhaScaleBiasSoftmaxBackward" in text


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="an extra, from 3.12 on")
@pick(*FORMS)
def test_tokamax_equals_the_formula(form):
  c = attention.call(FORMS[form], 14)
  assert max(distances(gradients(tokamax.attend, c), exact(c))) < 2e-6


def call_of(form: Form, T=256, H=64, dtype=jnp.bfloat16, **fields):
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  tokens = Tokens(np.zeros((2, T), np.int32))
  arrays = shape(2, T, 2, 3, H), shape(2, T, 2, H), shape(2, T, 2, H)
  return Call(*arrays, tokens, tokens, form, **fields)


CAUSAL, CAPPED, BIAS = FORMS["causal"], FORMS["soft cap"], {"bias_KGP": np.zeros(1)}
DROPPED = {"dropout": 0.1, "key": 0}


@pytest.mark.parametrize(
  ("platform", "call", "kernel"),
  [
    ("cpu", call_of(CAUSAL), blockwise),
    ("cpu", call_of(CAUSAL, T=8), plain),
    ("tpu", call_of(CAUSAL), splash),
    ("tpu", call_of(CAPPED), splash),
    ("tpu", call_of(CAUSAL, T=250), blockwise),
    ("tpu", call_of(CAUSAL, **BIAS), blockwise),
    ("tpu", call_of(CAUSAL, **DROPPED), blockwise),
    ("tpu", call_of(FORMS["by position"]), blockwise),
    ("gpu", call_of(CAUSAL), cudnn),
    ("gpu", call_of(CAUSAL, dtype=jnp.float32), blockwise),
    ("gpu", call_of(CAPPED), blockwise),
    ("gpu", call_of(CAUSAL, T=8192), blockwise),
    ("cpu", call_of(CAUSAL._replace(kernel="plain")), plain),
  ],
)
def test_auto_takes_the_best_that_can_serve(platform, call, kernel, monkeypatch):
  monkeypatch.setattr(mesh, "platform", lambda: platform)
  assert kernel_of(call) is kernel


@pytest.mark.parametrize(
  ("kernel", "fields", "message"),
  [
    ("splash", {}, r"'splash' cannot serve here: it runs on TPU, not on cpu; set it to 'auto'"),
    ("cudnn", {}, "it runs on GPU, not on cpu"),
    ("tokamax", BIAS, "biases of scores|not installed"),
    ("splash", DROPPED, "it has no dropout"),
  ],
)
def test_a_kernel_that_cannot_serve_is_refused(kernel, fields, message):
  with pytest.raises(Refused, match=message):
    kernel_of(call_of(CAUSAL._replace(kernel=kernel), **fields))


def test_a_form_that_a_kernel_never_computes_is_refused_before_any_device_work():
  check = lambda **fields: AttentionConfig(heads=2, **fields).check()
  check(kernel="cudnn")
  with pytest.raises(Refused, match="'cudnn' cannot serve here: it has no soft cap"):
    check(kernel="cudnn", softcap=30.0)
  with pytest.raises(Refused, match="'splash' cannot serve here: it has no dropout"):
    check(kernel="splash", dropout=0.1)


@pytest.mark.parametrize("T", [14, 300])  # Of 300 queries, every third is looked at.
def test_statistics_are_of_the_scores_whatever_computes_the_output(T):
  c = attention.call(CAUSAL._replace(kernel="blockwise"), T, bias=True)

  def run(arrays, bias_KGP):
    given = (*arrays, c.queries, c.keys, c.form)
    return taps.values(taps.collect(lambda: attend(Call(*given, bias_KGP=bias_KGP)))()[1])

  found = jax.jit(run)(c[:3], c.bias_KGP)
  score = np.einsum("btkgh,bskh->bkgts", np.float64(c.q_BTKGH), c.k_BSKH)
  score += c.bias_KGP[:, :, np.arange(T) - np.arange(T)[:, None] + T - 1]
  looked = slice(None, None, -(-T // 128))
  seen = attention.mask(c)[:, None, None, looked]
  score = np.where(seen, score[..., looked, :], -np.inf)
  weights = np.exp(score - score.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  entropy = -np.sum(weights * np.log(np.where(weights == 0, 1, weights)), -1).mean()
  np.testing.assert_allclose(found["score_max/"], score.max(), rtol=1e-5)
  np.testing.assert_allclose(found["entropy/"], entropy, rtol=1e-5)
