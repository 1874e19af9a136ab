import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.data.sources import NOVELS, Austen, Files
from bigtrain.data.stages import Stages
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import BPE, Bytes


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("BIGTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture
def files(tmp_path):
  """Sixty documents, one of them bad."""
  words = np.random.default_rng(0).integers(2, 60, 60)
  lines = [
    json.dumps({"text": f"{i}: " + "wörd " * n, "title": f"t {i}"}) for i, n in enumerate(words)
  ]
  (tmp_path / "a.jsonl").write_text("\n".join([*lines, "bad"]))
  (tmp_path / "b.jsonl").write_text('{"text": "held out", "title": "t"}')
  return Files(pattern=str(tmp_path / "a.jsonl"), validation=0.3)


def segments(batch):
  """The target tokens of every piece."""
  for i in range(len(batch["tokens"])):
    for segment in range(1, batch["segments"][i].max() + 1):
      yield batch["targets"][i][batch["segments"][i] == segment]


def test_the_corpus_is_split_by_chapter_over_all_novels_without_overlap():
  documents = list(Austen().documents(lambda n: None))
  held_out = [d.text for d in documents if d.held_out]
  train = [d.text for d in documents if not d.held_out]
  # Chapters by the books' own tables: Emma 55, Mansfield Park 48, Northanger Abbey 31, Persuasion
  # 24, Pride and Prejudice 61, Sense and Sensibility 50.
  assert len(documents) == 55 + 48 + 31 + 24 + 61 + 50
  assert len(NOVELS) == 6
  assert len(held_out) == 3 + 2 + 2 + 1 + 3 + 3
  assert 0.04 < sum(map(len, held_out)) / sum(len(d.text) for d in documents) < 0.06
  whole = "\n".join(train)
  for text in held_out:
    assert not any(text[at : at + 200] in whole for at in range(0, len(text) - 200, 1000))
  assert "It is a truth universally acknowledged" in whole


def test_the_corpus_is_the_six_novels_to_the_letter():
  words = " ".join(d.text for d in Austen().documents(lambda n: None)).split()
  assert len(words) == 717_537  # `cat austen/*.txt | wc -w` on the original files.
  digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
  assert digest == "11830715dbdc5560b92b5a0979bb38d2c1604784bd4b076b3c4302dad6a6b04f"


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("tokenizer", [Bytes(), BPE(vocab=300)])
def test_held_out_bytes_add_up_to_the_held_out_text(packing, tokenizer):
  data = TextData(tokenizer=tokenizer, packing=packing, seq=512).make(0)
  n = data.eval_examples()
  batches = [data.eval_batch(i, 100) for i in range(0, n + 99, 100)]
  text = sum(len(d.text.encode()) for d in Austen().documents(lambda n: None) if d.held_out)
  assert sum(b["bytes"].sum(dtype=np.float64) for b in batches) == text
  positions = data.manifest["splits"]["validation"]["positions"]
  assert sum(b["weights"].sum() for b in batches) == positions


def test_documents_that_fit_come_back_whole_from_an_epoch(files):
  data = TextData(source=files, seq=512).make(3)
  batch = data.batch(0, data.examples())
  found = sorted(data.tokenizer.decode(ids) for ids in segments(batch))
  lines = pathlib.Path(files.pattern).read_text().splitlines()[:-1]
  held_out = {data.tokenizer.decode(i) for i in segments(data.eval_batch(0, data.eval_examples()))}
  texts = {json.loads(line)["text"] for line in lines}
  assert found == sorted(texts - held_out)
  assert held_out < texts
  # Inputs begin with end-of-text, targets end with it.
  assert (batch["tokens"][(batch["positions"] == 0) & (batch["weights"] > 0)] == 256).all()
  assert all(ids[-1] == 256 for ids in segments(batch))


def test_rows_of_a_batch_do_not_depend_on_who_asks_for_them(files):
  whole = TextData(source=files, seq=64).make(3)
  expected = whole.batch(1000, 12), whole.eval_batch(2, 12)
  for wanted in (slice(0, 12), slice(3, 6), slice(11, 12)):
    fresh = TextData(source=files, seq=64).make(3)
    for found, all_rows in zip(
      (fresh.batch(1000, 12, wanted), fresh.eval_batch(2, 12, wanted)), expected, strict=True
    ):
      assert found.keys() == all_rows.keys()
      assert all(np.array_equal(found[k], all_rows[k][wanted]) for k in found)
  # The batch size only says how many: row i of it is example + i.
  assert np.array_equal(whole.batch(1003, 1)["tokens"], expected[0]["tokens"][3:4])


def test_the_spec_is_what_a_batch_is_and_needs_no_data(files):
  data = TextData(source=files, seq=64).make(0)
  batch = data.batch(0, 5)
  spec = TextData(source=Files(pattern="nowhere"), seq=64).make(0).spec(5)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in spec.items()
  }


def test_every_field_changes_the_batch(files):
  base = TextData(source=files, tokenizer=BPE(vocab=280), seq=32)
  other = {"pattern": files.pattern.replace("a.jsonl", "*.jsonl"), "text_field": "title"}
  other |= {"validation": files.pattern.replace("a.", "b."), "max_bytes": 200}
  changed = [
    dataclasses.replace(base, source=dataclasses.replace(files, **{k: v})) for k, v in other.items()
  ]
  changed += [
    dataclasses.replace(base, **{k: v})
    for k, v in {
      "source": Austen(),
      "tokenizer": BPE(vocab=281),
      "seq": 33,
      "packing": "concat",
    }.items()
  ]
  drawn = [c.make(0).batch(0, 30)["tokens"].tobytes() for c in [base, *changed]]
  drawn.append(base.make(1).batch(0, 30)["tokens"].tobytes())
  assert len(set(drawn)) == len(drawn)
  with pytest.raises(Refused, match=r"a\.jsonl:61: not JSON"):
    refusing = dataclasses.replace(files, on_error="refuse")
    dataclasses.replace(base, source=refusing).make(0).batch(0, 1)


def test_a_document_of_one_character_trains_and_evaluates_to_padding(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  data = TextData(source=Files(pattern=str(tmp_path / "a.txt"), validation=0.0), seq=8).make(0)
  batch = data.batch(5, 3)
  assert batch["tokens"].tolist() == [[256, 97, 0, 0, 0, 0, 0, 0]] * 3
  assert batch["targets"].tolist() == [[97, 256, 0, 0, 0, 0, 0, 0]] * 3
  assert data.eval_examples() == 0
  assert not data.eval_batch(0, 2)["weights"].any()
  far = TextData(source=Files(pattern=str(tmp_path / "a.txt"), validation=0.0), seq=10**8).make(0)
  with pytest.raises(Refused, match="rows of 100000000 tokens are longer than all of the training"):
    far.batch(0, 1)


def test_people_are_told_how_much_there_is_to_learn_from(files):
  text = TextData(source=files).make(0)
  train, held_out = (
    [d for d in files.documents(lambda n: None) if getattr(d, "held_out", None) is side]
    for side in (False, True)
  )
  # Bytes are tokens; an end-of-text follows each document.
  tokens, others = (sum(len(d.text.encode()) + 1 for d in side) for side in (train, held_out))
  assert tokens > 1000 and others > 1000
  about = f"{tokens / 1000:.3g}K tokens of {len(train)} documents, {others / 1000:.3g}K held out"
  assert text.about() == about
  staged = Stages(stages=((0, TextData(source=files)), (10, TextData(source=files, seq=32))))
  assert staged.make(0).about() == f"from step 0 on {about}; from step 10 on {about}"


def test_stages_give_each_step_its_data_and_refuse_what_cannot_follow(files):
  short, long = TextData(source=files, seq=32), TextData(source=files, seq=64)
  staged = Stages(stages=((0, short), (10, long)))
  staged.check()
  data = staged.make(0)
  assert [data.stage(s).batch(0, 2)["tokens"].shape[1] for s in (0, 9, 10, 99)] == [32, 32, 64, 64]
  assert data.eval_examples() == long.make(0).eval_examples()
  assert data.kept_out() == short.make(0).kept_out()  # Once.
  assert "1 x not JSON" in str(data.kept_out())
  assert data.tokenizer.digest == long.make(0).tokenizer.digest
  with pytest.raises(Refused, match="the first is 0"):
    Stages(stages=((1, short),)).check()
  with pytest.raises(Refused, match="the same tokenizer"):
    Stages(stages=((0, short), (5, TextData(source=files, tokenizer=BPE(vocab=300))))).check()
  learned = TextData(source=files, tokenizer=BPE(vocab=300))
  Stages(stages=((0, learned), (5, dataclasses.replace(learned, seq=32)))).check()
  with pytest.raises(Refused, match="BPE learns one from each"):  # Even of the same size.
    Stages(stages=((0, learned), (5, dataclasses.replace(learned, source=Austen())))).check()


def test_smoke_takes_short_rows_of_a_small_corpus(files, monkeypatch):
  small = TextData(source=files, seq=4096).smoke()
  assert (small.seq, small.source) == (128, files)
  monkeypatch.setattr("bigtrain.data.text.SMOKE_BYTES", 10)
  assert TextData(source=files).smoke().source == Austen()
