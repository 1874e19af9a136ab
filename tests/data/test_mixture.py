"""Mixtures: exact shares, order as a function of the number, losses by source."""

import dataclasses

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.mixture import BLOCK, Mixture, Source, places
from bigtrain.data.sources import Files, check_apart
from bigtrain.data.stages import Stages
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE, Bytes
from bigtrain.experiment import Logging
from bigtrain.mesh import Mesh
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.train import train
from bigtrain.validate import validate
from tests import packed


@pytest.fixture
def sized(monkeypatch):
  """Packed data that says how many examples an epoch has: as many as it holds out, times ten."""
  monkeypatch.setattr(packed.PackedData, "examples", lambda self: 10 * self.c.examples)


def mixture(*weights, examples=(13, 5, 7), **fields) -> Mixture:
  weights = weights or (None,) * len(examples)
  parts = zip("abc", examples, weights, strict=False)
  sources = tuple(Source(name=n, data=packed.Packed(examples=e), weight=w) for n, e, w in parts)
  return Mixture(sources=sources, **fields)


def test_every_block_holds_each_source_by_its_weight_and_each_example_once():
  data = mixture(5.0, 3.0, 2.0).make(0)
  for block in (0, 1, 77):
    sources, numbers = data.order(block * BLOCK + np.arange(BLOCK))
    assert np.bincount(sources).tolist() == [5000, 3000, 2000]
    for k, count in enumerate([5000, 3000, 2000]):
      assert numbers[sources == k].tolist() == list(range(block * count, (block + 1) * count))


def test_sources_take_turns_evenly_within_a_block():
  sources, _ = mixture(1.0, 1.0, 2.0).make(3).order(np.arange(BLOCK))
  for part in np.split(sources, 10):
    np.testing.assert_allclose(np.bincount(part) / len(part), [0.25, 0.25, 0.5], atol=0.06)


def test_another_seed_deals_other_turns():
  first, second = (mixture(1.0, 1.0, 2.0).make(seed).order(np.arange(50))[0] for seed in (0, 1))
  assert first.tolist() != second.tolist()


@pytest.mark.parametrize("method", ["batch", "eval_batch"])
def test_any_slice_of_a_batch_has_the_same_bytes(method):
  data = mixture(5.0, 3.0, 2.0).make(0)
  at = BLOCK - 8 if method == "batch" else 5  # Over the end of a block; over that of a source.
  whole = getattr(data, method)(at, 16)
  for rows in (slice(0, 4), slice(4, 16), slice(7, 8)):
    for name, values in getattr(mixture(5.0, 3.0, 2.0).make(0), method)(at, 16, rows).items():
      assert values.tobytes() == whole[name][rows].tobytes(), name


def test_rows_are_those_of_their_source():
  c = mixture(5.0, 3.0, 2.0)
  data, batch = c.make(0), c.make(0).batch(100, 20)
  sources, numbers = data.order(100 + np.arange(20))
  for i, (k, n) in enumerate(zip(sources, numbers, strict=True)):
    own = c.sources[k].data.make(0).batch(int(n), 1)
    assert np.array_equal(batch["tokens"][i], own["tokens"][0])
    assert [batch[f"source/{name}"][i] for name in "abc"] == [float(j == k) for j in range(3)]


def test_evaluation_goes_through_each_source_once_and_then_pads():
  data = mixture(5.0, 3.0, 2.0).make(0)
  assert data.eval_examples() == 25
  batch = data.eval_batch(0, 32)
  assert [batch[f"source/{n}"][:25].sum() for n in "abc"] == [13, 5, 7]
  assert batch["weights"][:25].any(1).all() and not batch["weights"][25:].any()


@pytest.mark.parametrize(
  ("temperature", "wanted"), [(1.0, [0.52, 0.2, 0.28]), (2.0, None), (1e6, [1 / 3, 1 / 3, 1 / 3])]
)
def test_without_weights_sizes_decide_and_temperature_levels_them(sized, temperature, wanted):
  sizes = np.array([13, 5, 7]) ** (1 / temperature)
  wanted = sizes / sizes.sum() if wanted is None else wanted
  np.testing.assert_allclose(
    mixture(temperature=temperature).make(0).counts / BLOCK, wanted, atol=1e-4
  )


def test_epochs_weigh_a_sources_examples(sized):
  c = mixture(examples=(10, 10))
  c.sources[1].epochs = 3.0
  assert c.make(0).counts.tolist() == [2500, 7500]
  assert c.make(0).examples() == 400  # Until the first has been through its 100.


def test_places_are_given_to_the_largest_remainders():
  assert places(np.array([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
  assert places(np.array([0.26, 0.74]), 10).tolist() == [3, 7]


@pytest.mark.parametrize(
  ("c", "message"),
  [
    (mixture(1.0, 0.0, 2.0), "the source 'b' has weight 0.0; give one above 0, or leave the"),
    (Mixture(sources=()), "give one or more"),
    (dataclasses.replace(mixture(1.0), temperature=0.0), "temperature is 0.0; it is above 0"),
    (Mixture(sources=mixture(1.0).sources * 2), "each a name of its own"),
  ],
)
def test_an_impossible_mixture_is_refused(c, message):
  with pytest.raises(Refused, match=message):
    validate(packed.experiment(data=c))


def test_a_source_too_rare_for_a_block_is_refused():
  with pytest.raises(Refused, match="'b' has less than 1 in 10000"):
    mixture(1.0, 1e-9, 1.0).make(0).batch(0, 4)


def test_sources_of_other_row_lengths_are_refused():
  c = mixture(1.0, 1.0)
  c.sources[1].data.seq = 7
  with pytest.raises(Refused, match="sources differ in row length"):
    validate(packed.experiment(data=c))


def test_what_a_source_refuses_names_the_source(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  (tmp_path / "a.txt").write_text("a single document")
  web = TextData(source=Files(pattern=str(tmp_path / "a.txt"), validation=1e-9), seq=32)
  sources = (Source(name="books", data=TextData(seq=32)), Source(name="web", data=web))
  for ask in ("digest", "examples", "about", "eval_examples"):
    with pytest.raises(Refused, match=r"^the source 'web': validation=1e-09 holds out none of"):
      getattr(Mixture(sources=sources).make(0), ask)()


def test_sources_whose_tokenizers_learn_from_other_texts_are_refused(tmp_path):
  def texts(tokenizer):
    here = [tmp_path / f"{name}.txt" for name in "ab"]
    for path in here:
      path.write_text("It is.")
    sources = [TextData(source=Files(pattern=str(p)), tokenizer=tokenizer) for p in here]
    return Mixture(sources=tuple(Source(name=f"{i}", data=d) for i, d in enumerate(sources)))

  with pytest.raises(Refused, match="sources have different tokenizers"):
    texts(BPE(vocab=300)).check()
  texts(Bytes()).check()


def test_the_losses_of_all_sources_add_up_to_the_whole_and_are_evaluated(tmp_path):
  e = packed.experiment(
    data=mixture(5.0, 3.0, 2.0),
    optimizer=SGD(lr=0.1, schedule=Constant(warmup=0)),
    batch=32,
    steps=2,
    mesh=Mesh(data=2, fsdp=2, tensor=2),
    logging=Logging(every=1, layers_every=0, tensorboard=False),
  )
  run = train(e, tmp_path, quiet=True)
  data = e.data.make(e.seed)
  batch = data.batch(0, 32)
  tokens = [(batch["weights"] * batch[f"source/{n}"][:, None]).sum() for n in "abc"]
  losses = [run.metrics[f"loss/{n}"][0] for n in "abc"]
  assert np.dot(tokens, losses) / sum(tokens) == pytest.approx(run.metrics["loss"][0], rel=1e-5)
  assert len({round(float(loss), 4) for loss in losses}) == 3
  assert {f"eval/validation/loss/{n}" for n in "abc"} <= run.evaluations.keys()


@pytest.mark.parametrize(
  "sides", [("a", 0.1, "a", 0.01), ("a", "b", "b", 0.1), ("a", 0.0, "b", "a")]
)
def test_a_file_that_one_source_holds_out_and_another_trains_on_is_refused(tmp_path, sides):
  for name in "ab":
    (tmp_path / f"{name}.txt").write_text(name)
  place = lambda side: f"{tmp_path}/{side}.txt" if isinstance(side, str) else side
  text = lambda train, held_out: TextData(
    source=Files(pattern=place(train), validation=place(held_out)), tokenizer=Bytes(), seq=packed.T
  )
  mixed = lambda *texts: Mixture(
    sources=tuple(Source(name=f"{i}", data=t, weight=1.0) for i, t in enumerate(texts))
  )
  first, second = text(*sides[:2]), text(*sides[2:])
  staged = Stages(stages=((0, mixed(first)), (5, second)))
  for data in (mixed(first, second), staged):
    with pytest.raises(
      Refused, match=r"/[ab]\.txt is trained on in one of data\..*source and data"
    ):
      check_apart(data)
  check_apart(mixed(first, first))
