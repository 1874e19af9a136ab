"""Duplicates of every kind are found, and nothing else is; splits stay when documents are added."""

import random

import numpy as np
import pytest

pytest.importorskip("datatrove")

from bigtrain.data.prepare.near import groups, joined, signing
from bigtrain.data.prepare.pack import LINES, ONLY_SHARED, RESIDUE, SPLITS
from bigtrain.data.prepare.recipe import NearDuplicates, SharedLines
from bigtrain.data.prepare.run import prepare
from tests.data.prepare.corpus import (
  digest,
  document,
  jaccard,
  jsonl,
  kept,
  prepared,
  reasons,
  recipe,
  rejected,
  report,
  varied,
)


def test_near_duplicates_are_found_at_the_recall_of_the_bands(tmp_path):
  rng = random.Random(0)
  near = NearDuplicates(threshold=0.5, bands=7, rows=8)
  bases = [document(i, 200) for i in range(150)]
  pairs = [(b, varied(b, rng.choice([0.02, 0.06, 0.1, 0.16]), rng)) for b in bases]
  far = [varied(b, 0.5, rng) for b in bases[:50]]
  jsonl(tmp_path / "in" / "a.jsonl", bases)
  jsonl(tmp_path / "in" / "b.jsonl", [v for _, v in pairs])
  jsonl(tmp_path / "in" / "c.jsonl", far)
  prepare(recipe(tmp_path / "in", near=near, tasks=3), tmp_path / "out")
  texts = set(kept(tmp_path / "out"))
  similarities = [jaccard(a, b) for a, b in pairs]
  expected = sum(near.recall(s) for s in similarities if s >= 0.5)
  found = sum((a in texts) + (b in texts) == 1 for a, b in pairs)
  spread = sum(near.recall(s) * (1 - near.recall(s)) for s in similarities) ** 0.5
  assert abs(found - expected) <= 3 * spread + 1
  assert found < len(pairs), "nothing was missed: the pairs are too easy to test the bands"
  assert set(far) <= texts, "a document below the threshold was lost"
  for record in rejected(tmp_path / "out"):
    assert record["reason"] == "near duplicate"
    assert max(jaccard(record["text"], other) for other in texts) >= 0.5


def test_pairs_that_meet_below_the_threshold_stay_both(tmp_path):
  rng = random.Random(1)
  near = NearDuplicates(threshold=0.9, bands=30, rows=1)  # Almost any pair meets.
  bases = [document(i, 100) for i in range(30)]
  jsonl(tmp_path / "in" / "a.jsonl", bases + [varied(b, 0.2, rng) for b in bases])
  prepare(recipe(tmp_path / "in", near=near), tmp_path / "out")
  assert len(kept(tmp_path / "out")) == 60
  near = report(tmp_path / "out")["near"]
  assert near["pairs"] == near["below_threshold"] > 30


def test_added_documents_change_no_split_but_of_reported_clusters(tmp_path):
  rng = random.Random(2)
  old = [document(i, 100) for i in range(300)]
  jsonl(tmp_path / "in" / "m.jsonl", old)
  prepare(recipe(tmp_path / "in"), tmp_path / "one")
  before = kept(tmp_path / "one")
  assert {s: list(before.values()).count(s) > 15 for s in SPLITS} == dict.fromkeys(SPLITS, True)
  new = [document(1000 + i, 100) for i in range(200)] + [varied(t, 0.02, rng) for t in old[:60]]
  jsonl(tmp_path / "in" / "a.jsonl", new)  # Sorted before the old file: all tasks shift.
  prepare(recipe(tmp_path / "in", previous=str(tmp_path / "one"), tasks=3), tmp_path / "two")
  after = kept(tmp_path / "two")
  told = report(tmp_path / "two")["previous"]
  assert (told["both"], told["gone"], told["added"]) == (300, 0, 260)
  moved = {digest(t) for t in old if t in after and after[t] != before[t]}
  reported = {c["digest"] for c in told["changed"]}
  assert moved <= reported
  assert 0 < told["cluster_changed"] <= 60 and len(reported) <= told["cluster_changed"]
  assert told["split_changed"] == len(reported)


def test_a_cluster_is_named_by_the_smallest_digest_of_its_documents_to_the_last_bit(tmp_path):
  rng = random.Random(3)
  pairs = [(b, varied(b, 0.02, rng)) for b in (document(i, 100) for i in range(20))]
  out = prepared(tmp_path, [t for pair in pairs for t in pair])
  found = np.concatenate([np.load(p) for p in sorted((out / "assignment").iterdir())])
  clusters = {f"{own:016x}": f"{cluster:016x}" for own, cluster in found.tolist()}
  together = 0
  for pair in pairs:
    assert set(pair) & set(kept(out))
    names = sorted(map(digest, pair))
    if len(set(pair) & set(kept(out))) == 1:
      assert [clusters[n] for n in names] == [names[0]] * 2
      assert digest(next(t for t in pair if t in kept(out))) == names[0]
      together += 1
  assert together > 15


def test_a_long_document_has_the_signature_of_all_its_shingles(tmp_path):
  step = signing(NearDuplicates(), tmp_path)
  shingles = step.get_shingles(document(0, 9000))
  whole = super(type(step), step).get_signature(shingles)
  assert len(shingles) > 8000 and step.get_signature(shingles) == whole


NOTICE, MENU = "All rights of this site are reserved", "Home | About us | Contact | Imprint"


def test_lines_that_many_documents_share_are_taken_out_of_all_of_them(tmp_path):
  bodies = [document(i) for i in range(8)]
  few = f"{document(90)}\nStands in three documents alone"
  texts = [f"{MENU}\n{b}\n{NOTICE}" for b in bodies[:6]]
  texts += [f"{NOTICE}\n{b}\nshort" for b in bodies[6:]]
  texts += [few, *(f"{document(i)}\nStands in three documents alone" for i in (91, 92))]
  texts += [texts[0]] * 5 + [f"{bodies[0]}\n{NOTICE}\n{MENU}"]  # Copies do not count.
  lines = SharedLines(documents=6)
  out = prepared(tmp_path, texts, lines=lines, near=NearDuplicates(threshold=0.5, bands=30, rows=2))
  found = kept(out)
  assert set(found) >= {*bodies[1:6], few} and f"{bodies[7]}\nshort" in found
  assert report(out)["shared_lines"] == [[8, NOTICE], [6, MENU]]
  row = report(out)["steps"][-1]
  assert (row["name"], row["changed"]) == (LINES, 8) and row["chars_changed"] < 0
  five = prepared(tmp_path / "off", texts, near=None)
  assert texts[1] in kept(five) and report(five)["shared_lines"] == []


def test_documents_that_are_equal_without_their_shared_lines_stay_once(tmp_path):
  menus = [f"Home | About us | Contact | Language {i % 2} of this page" for i in range(12)]
  bodies = [document(i, 6) for i in range(12)]
  texts = [f"{m}\n{b}" for m, b in zip(menus, bodies, strict=True)]
  texts += [f"{menus[1]}\n{bodies[0]}", menus[0]]
  out = prepared(tmp_path, texts, lines=SharedLines(documents=4), near=None)
  assert set(kept(out)) == set(bodies)
  why = reasons(out)
  assert why[menus[0]] == (ONLY_SHARED, ONLY_SHARED)
  [lost] = [t for t, (_, reason) in why.items() if reason == RESIDUE]
  # Both are in the split of the smaller digest, whichever document stays.
  assert lost == max(texts[0], texts[12], key=digest)


def test_twins_among_pages_that_share_less_are_found_at_the_recall_of_the_bands(tmp_path):
  # Pages of one template meet in crowds, in which datatrove pairs neighbours alone.
  rng = random.Random(0)
  near = NearDuplicates(threshold=0.75, bands=14, rows=8)
  template = document(0, 500)
  own = [document(i, 110) for i in range(1, 101)]
  pages = [f"{template} {text}" for text in own]
  twins = [f"{template} {varied(text, 0.5, rng)}" for text in own]
  similarities = [jaccard(a, b) for a, b in zip(pages, twins, strict=True)]
  assert jaccard(pages[0], pages[1]) < 0.71 and min(similarities) > 0.75
  prepare(recipe(jsonl(tmp_path / "a.jsonl", pages + twins), near=near), tmp_path / "out")
  texts = kept(tmp_path / "out")
  found = sum((a in texts) + (b in texts) < 2 for a, b in zip(pages, twins, strict=True))
  promised = [near.recall(s) for s in similarities]
  assert found >= sum(promised) - 3 * sum(p * (1 - p) for p in promised) ** 0.5


def test_of_documents_that_met_each_is_compared_until_all_similar_ones_are_together(monkeypatch):
  sets = [np.arange(i * 100, i * 100 + 10) for i in range(6)]
  sets = [*sets, sets[0] + 1, sets[4], sets[0] + 2]  # Of 11 numbers 9 are shared, of 12 only 8.
  counts = {"pairs": 0, "below_threshold": 0, "left_out": 0}
  assert list(joined(sets, 0.8, counts)) == [(0, 6), (4, 7), (6, 8)]
  assert counts["pairs"] - counts["below_threshold"] == 3 and counts["left_out"] == 0
  monkeypatch.setattr("bigtrain.data.prepare.near.COMPARED", 4)
  assert list(joined(sets, 0.8, counts)) == [(4, 7), (6, 8)] and counts["left_out"] == 10
  chains = np.array([(0, 1, 0, 2), (0, 2, 1, 0), (1, 5, 1, 6)], np.uint32)
  assert list(groups(chains)) == [[(0, 1), (0, 2), (1, 0)], [(1, 5), (1, 6)]]
  assert list(groups(chains[:0])) == []
