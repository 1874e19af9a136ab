"""Made-up documents and what a preparation makes of them."""

import hashlib
import json
import pathlib
import random
import re

from bigtrain.data.prepare.clean import TAKEN
from bigtrain.data.prepare.engine import Local
from bigtrain.data.prepare.files import read_json, read_lines
from bigtrain.data.prepare.pack import LINES, SPLITS, read_shard
from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.run import prepare
from bigtrain.data.prepare.steps import ControlCharacters, Repair, Whitespace

WORDS = [f"w{i:03}" for i in range(900)]


def letters(text: str) -> str:
  """Digits as letters: MinHash takes all numbers for one."""
  return re.sub(r"\d", lambda d: "abcdefghij"[int(d[0])], text)


def document(seed: int, words: int = 60) -> str:
  rng = random.Random(seed)
  return letters(" ".join(rng.choice(WORDS) for _ in range(words)))


def varied(text: str, share: float, rng: random.Random) -> str:
  """The text with some of its words replaced by new ones, at a random place in one run."""
  words = text.split()
  n = max(1, round(share * len(words)))
  at = rng.randrange(len(words) - n)
  return " ".join(
    [*words[:at], *(letters(f"x{rng.randrange(10**6)}") for _ in range(n)), *words[at + n :]]
  )


def jaccard(a: str, b: str, n: int = 5) -> float:
  """Similarity of the sets of word n-grams."""
  one, two = (
    {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (a.split(), b.split())
  )
  return len(one & two) / len(one | two)


def jsonl(path: pathlib.Path, texts) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
  return path


def recipe(folder, **fields) -> Prepare:
  defaults = {
    "steps": (Repair(), ControlCharacters(), Whitespace()),
    "tasks": 2,
    "engine": Local(workers=1),
    "validation": 0.2,
    "test": 0.1,
  }
  return Prepare(inputs=(str(folder),), **(defaults | fields))


def prepared(root: pathlib.Path, texts, **fields) -> pathlib.Path:
  """The folder of a preparation of the texts."""
  prepare(recipe(jsonl(root / "in" / "a.jsonl", texts), **fields), root / "out")
  return root / "out"


def kept(out: pathlib.Path) -> dict[str, str]:
  """{text: split} of all that was kept."""
  found = {}
  for split in SPLITS:
    for path in sorted((out / "shards").glob(f"{split}-*")):
      for record in read_shard(path):
        assert record["text"] not in found, "a text was kept twice"
        found[record["text"]] = split
  return found


def rejected(out: pathlib.Path) -> list[dict]:
  """The documents that were rejected."""
  found = [r for path in sorted((out / "rejected").iterdir()) for r in read_lines(path)]
  return [r for r in found if r["reason"] not in (LINES, TAKEN)]


def reasons(out: pathlib.Path) -> dict[str, tuple[str, str]]:
  """{text: (step, reason)} of what was rejected."""
  return {r["text"]: (r["step"], r["reason"]) for r in rejected(out) if "text" in r}


def report(out: pathlib.Path) -> dict:
  return read_json(out / "report.json")


def digest(text: str) -> str:
  """The first half of a text's digest, as reports name it."""
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:16]


def contents(out: pathlib.Path) -> dict[str, str]:
  """The digests of all results."""
  paths = [p for f in ("shards", "rejected", "assignment") for p in sorted((out / f).iterdir())]
  paths += [out / "manifest.json", out / "tokenizer.json"]
  return {
    str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.exists()
  }
