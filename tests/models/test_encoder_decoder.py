"""The encoder-decoder; outputs equal those of `transformers` (tools/golden/make_t5.py).

Dims: B batch, S source position, T target position.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.generate import Sampling, generate
from bigtrain.interop.huggingface import load_weights
from bigtrain.kernels.attention import Tokens
from bigtrain.mesh import Mesh
from bigtrain.models import presets
from bigtrain.models.count import count_parameters
from bigtrain.models.position import RelativeBuckets, Rotary
from tests import golden
from tests.models.build import filled

pytestmark = pytest.mark.smoke

TOLERANCE = 1e-4
ROWS = ("tokens", "mask", "inputs", "target_mask", "logits", "decoded")
SIDES = ("encoder", "decoder")
NAMES = pytest.mark.parametrize("name", ["t5", "t5_tied"])


def config(name="t5"):
  """The preset with the sizes of the golden file; all else is as published."""
  c = presets.t5("small")
  c.vocab, c.dim, c.layers, c.decoder_layers, c.dtype = 64, 24, 3, 2, "float32"
  c.relative = RelativeBuckets(buckets=8, distance=20)
  block = c.pattern[0]
  block.attention.heads, block.attention.head_dim, block.feed_forward.hidden = 4, 8, 40
  if name == "t5_tied":  # Version 1.0.
    c.tied, block.feed_forward.activation, block.feed_forward.gated = True, "relu", False
  return c


@functools.cache
def loaded(name="t5"):
  """(model, weights, rows)."""
  arrays = {k: x for k, x in golden.read(name).items() if not k.startswith("buckets")}
  rows = {k: arrays.pop(k) for k in ROWS}
  shapes = jax.eval_shape(lambda: config(name).make(jax.random.key(0)))
  return load_weights(shapes, arrays), arrays, rows


def alone(mask):
  """Rows that are one document and padding."""
  return Tokens(np.arange(mask.shape[1]) * mask, mask)


@jax.jit
def run(model, tokens, inputs, source=None, target=None):
  return model(tokens, inputs, source, target)


def error(name, model):
  rows = loaded(name)[2]
  sides = alone(rows["mask"]), alone(rows["target_mask"])
  logits = run(model, rows["tokens"], rows["inputs"], *sides)
  return np.abs(logits - rows["logits"])[rows["target_mask"] == 1].max()


@NAMES
def test_logits_are_those_of_the_reference_on_padded_rows(name):
  rows = loaded(name)[2]
  assert len(set(rows["mask"].sum(1))) == len(set(rows["target_mask"].sum(1))) == 2
  assert rows["mask"].sum(1).min() > config().relative.distance < rows["target_mask"].sum(1).min()
  assert error(name, loaded(name)[0]) < TOLERANCE


@NAMES
def test_one_changed_weight_of_any_parameter_is_noticed(name):
  model, _, rows = loaded(name)
  leaves, tree = jax.tree_util.tree_flatten_with_path(model)
  leaves = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  assert len(leaves) == (29 if name == "t5" else 26)
  for path, leaf in leaves.items():
    row = rows["tokens"][0, 0] if "embed" in path else 0  # A row that is looked up.
    other = leaves | {path: leaf.at[(row,) + (0,) * (leaf.ndim - 1)].add(0.05)}
    assert error(name, jax.tree.unflatten(tree, other.values())) > TOLERANCE, path


@pytest.mark.parametrize("setting", ["scaled", "tied", "buckets", "distance", "start"])
def test_a_changed_setting_is_noticed(setting):
  c = config("t5_tied")
  changes = {
    "scaled": (c.pattern[0].attention, True),
    "tied": (c, False),
    "buckets": (c.relative, 10),
    "distance": (c.relative, 40),
    "start": (c, 5),
  }
  owner, value = changes[setting]
  setattr(owner, setting, value)
  weights, rows = loaded("t5_tied")[1:]
  side = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  if setting == "tied":
    weights = weights | {"lm_head.weight": weights["shared.weight"]}
  if setting == "buckets":
    longer = {f"{s}{side}": np.pad(weights[f"{s}{side}"], ((0, 2), (0, 0))) for s in SIDES}
    weights = weights | longer
  model = load_weights(jax.eval_shape(lambda: c.make(jax.random.key(0))), weights)
  if setting == "start":
    assert greedy(model, rows)[0].tolist() != rows["decoded"][0].tolist()
  else:
    assert error("t5_tied", model) > 10 * TOLERANCE


def greedy(model, rows):
  prompts = [line[: mask.sum()] for line, mask in zip(rows["tokens"], rows["mask"], strict=True)]
  return generate(model, prompts, rows["decoded"].shape[1], Sampling(temperature=0.0))


@NAMES
def test_greedy_tokens_are_those_of_the_reference(name):
  model, _, rows = loaded(name)
  assert [row.tolist() for row in greedy(model, rows)] == rows["decoded"].tolist()
  if name == "t5":  # With one table each token predicts itself.
    assert all(len(set(row.tolist())) > 4 for row in rows["decoded"])


def test_a_mesh_changes_no_token_that_is_sampled():
  model, _, rows = loaded()
  prompts, sampling = [rows["tokens"][0, :9], rows["tokens"][1, :30]], Sampling(top_k=20)
  plain = generate(model, prompts, 8, sampling)
  with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).make()):
    abstract = jax.eval_shape(lambda: config().make(jax.random.key(0)))
    place = lambda x, like: jax.device_put(x, jax.sharding.NamedSharding(mesh, like.sharding.spec))
    mesh = jax.sharding.get_mesh()
    on_mesh = generate(jax.tree.map(place, model, abstract), prompts, 8, sampling)
  assert [a.tolist() for a in on_mesh] == [a.tolist() for a in plain]


def test_the_cache_gives_the_logits_of_the_whole_forward_pass():
  model, _, rows = loaded()
  tokens, inputs = rows["tokens"], rows["inputs"]
  whole = run(model, tokens, inputs)
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  place = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)

  @jax.jit
  def in_parts(model, tokens, positions):
    _, _, cache = model.begin(tokens, positions, inputs.shape[1])
    found = []
    for part in (slice(0, 1), slice(1, 8), slice(8, None)):
      logits, cache = model.decode(inputs[:, part], place[:, part], cache)
      found.append(logits)
    return jnp.concatenate(found, axis=1)

  np.testing.assert_allclose(in_parts(model, tokens, positions), whole, atol=TOLERANCE)


def test_packed_documents_have_the_logits_of_each_alone():
  """Two documents in one row on both sides, with padding behind."""
  model, _, rows = loaded()
  (s0, s1), (t0, t1) = (24, 13), (9, 17)
  pack = lambda x, n, m: np.concatenate([x[0, :n], x[1, :m], x[0, :3]])[None]
  place = lambda n, m: Tokens(
    np.concatenate([np.arange(n), np.arange(m), np.zeros(3, int)])[None],
    np.repeat([1, 2, 0], [n, m, 3])[None],
  )
  tokens, inputs = pack(rows["tokens"], s0, s1), pack(rows["inputs"], t0, t1)
  logits = run(model, tokens, inputs, place(s0, s1), place(t0, t1))[0]
  first = run(model, rows["tokens"][:1, :s0], rows["inputs"][:1, :t0])[0]
  second = run(model, rows["tokens"][1:, :s1], rows["inputs"][1:, :t1])[0]
  np.testing.assert_allclose(logits[:t0], first, atol=TOLERANCE)
  np.testing.assert_allclose(logits[t0 : t0 + t1], second, atol=TOLERANCE)
  one = Tokens(place(s0, s1).positions, np.ones_like(tokens))
  assert np.abs(run(model, tokens, inputs, one, place(t0, t1))[0] - logits)[:t0].max() > 0.1


def test_a_target_sees_all_of_the_source_and_no_later_target():
  model, _, rows = loaded()
  logits = lambda w, t: w(rows["tokens"][:1], rows["inputs"][:1])[0, t].sum()
  gradient = jax.jit(jax.grad(logits))
  # Tokens that stand on one side only.
  sources = set(rows["tokens"][0].tolist()) - set(rows["inputs"][0].tolist())
  for t in (0, 20):
    moved = np.abs(gradient(model, t).embed_VD[...]).max(axis=1)
    before = set(rows["inputs"][0, : t + 1].tolist())
    assert all(moved[i] > 0 for i in sources | before)
    assert not any(moved[i] for i in range(64) if i not in {*rows["tokens"][0].tolist(), *before})


def test_dropout_needs_a_key_and_is_on_both_sides():
  c = config()
  c.dropout = c.pattern[0].attention.dropout = c.pattern[0].feed_forward.dropout = 0.1
  model, rows = filled(c.make), loaded()[2]
  tokens, inputs = rows["tokens"], rows["inputs"]
  source = Tokens(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
  both = jax.jit(lambda m, key: (m.encode(tokens, source, key), m(tokens, inputs, key=key)))
  found = [both(model, key) for key in (None, None, jax.random.key(0), jax.random.key(1))]
  for plain, again, dropped, other in zip(*found, strict=True):
    np.testing.assert_array_equal(plain, again)
    assert np.abs(plain - dropped).max() > 1e-3 < np.abs(dropped - other).max()


@pytest.mark.parametrize(
  ("size", "parameters"),
  # T5ForConditionalGeneration of `transformers` 5.23 on the meta device with the config of
  # google/t5-v1_1-*, and vocab * dim more: it counts both tables as one.
  [
    ("small", 76_961_152),
    ("base", 247_577_856),
    ("large", 783_150_080),
    ("xl", 2_849_757_184),
    ("xxl", 11_135_332_352),
  ],
)
def test_counts_are_those_of_the_released_weights(size, parameters):
  assert count_parameters(presets.t5(size)) == parameters


def test_first_weights_have_the_deviations_of_the_paper():
  """Mesh TensorFlow's: d^-0.5, of queries (d * head)^-0.5, of the embedding 1."""
  c = config()
  c.dim, c.layers, c.decoder_layers, c.vocab = 96, 1, None, 500
  model = jax.jit(c.make)(jax.random.key(0))
  block = model.decoder.segments[0][0]
  expected = {
    "embed": (model.embed_VD, 1.0),
    "output": (model.output_table_VD, 96**-0.5),
    "query": (block.attention.q_DKGH, (96 * 8) ** -0.5),
    "cross": (block.cross.q_DKGH, (96 * 8) ** -0.5),
    "key": (block.attention.k_DKH, 96**-0.5),
    "out": (block.cross.o_KGHD, 32**-0.5),
    "up": (block.feed_forward.up_DF, 96**-0.5),
    "down": (block.feed_forward.down_FD, 40**-0.5),
  }
  for name, (w, deviation) in expected.items():
    assert np.std(w[...]) == pytest.approx(deviation, rel=0.05), name


def test_distances_to_the_other_side_mean_nothing():
  c = config()
  c.pattern[0].attention.rotary, c.pattern[0].attention.window = Rotary(), 5
  cross = c.decoder().pattern[0].cross
  assert cross.rotary is None and cross.window is None and not cross.causal
  assert c.decoder().pattern[0].attention.rotary is not None


def test_flops_are_those_of_every_product_that_is_made():
  """Twice the multiplications of the forward pass, three times; half of the causal scores."""
  c = config()
  S, T, D, V, heads, F = 50, 20, 24, 64, 4 * 8, 40
  encoder = S * (4 * D * heads + 3 * D * F) + 2 * heads * S * S
  own = T * (4 * D * heads + 3 * D * F) + 2 * heads * T * T / 2
  cross = 2 * D * heads * (T + S) + 2 * heads * T * S
  assert c.flops(S, T) == 6 * (3 * encoder + 2 * (own + cross) + T * D * V)
  assert c.flops(S) == c.flops(S, S)


def test_what_no_encoder_decoder_can_be_is_refused():
  def refused(match, **fields):
    c = config()
    for name, value in fields.items():
      setattr(c.pattern[0].attention if name == "causal" else c, name, value)
    with pytest.raises(Refused, match=match):
      c.check()

  config().check()
  refused(r"set attention\.causal to False", causal=True)
  refused("start is 64; it is a token, from 0 to 63", start=64)
  refused("decoder_layers is 0", decoder_layers=0)
  refused("an even number, at least 4", relative=RelativeBuckets(buckets=7))
  refused("set it above 4", relative=RelativeBuckets(buckets=8, distance=4))
  c = config()
  c.first = (presets.t5("base").pattern[0],)
  with pytest.raises(Refused, match="one table for all layers"):
    c.check()
