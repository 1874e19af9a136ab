"""Sources: where documents come from, and which of them are held out.

Everything is streamed: a document at a time is in memory. What cannot be used is never dropped in
silence: it comes out of the stream as a `Problem` with its file and line.
"""

import glob
import hashlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from bigtrain.config import Refused, config, configs, nearest, shortened
from bigtrain.data.readers import Problem, kind_of, read
from bigtrain.files import read_json
from bigtrain.hints import command

CORPUS = pathlib.Path(__file__).parent / "corpus"
NOVELS = (
  "emma",
  "mansfield_park",
  "northanger_abbey",
  "persuasion",
  "pride_and_prejudice",
  "sense_and_sensibility",
)
KINDS = ".txt, .jsonl (also .gz, .zst) or .parquet"
CHAPTER = re.compile(r"^(?:volume [ivx]+\s+)?chapter (?:[ivxl]+|\d+)[ \t]*$", re.I | re.M)


class Document(NamedTuple):
  text: str
  held_out: bool  # Validation, not training.


class Input(NamedTuple):
  path: pathlib.Path
  held_out: bool | None  # All of it or nothing; None where each document decides.


Advance = Callable[[int], None]  # Told how many bytes of a file were read.


@config
class Austen:
  """The six completed novels of Jane Austen, in the package: 4 MB, one document a chapter.

  The tenth of every twenty chapters of a novel is held out.
  """

  def inputs(self) -> list[Input]:
    return [Input(CORPUS / f"{name}.txt.zst", None) for name in NOVELS]

  def settings(self) -> str:
    return "austen 1"

  def documents(self, advance: Advance) -> Iterator[Document | Problem]:
    for _, _, document in self.chapters(advance):
      yield document

  def chapters(self, advance: Advance = lambda read: None) -> Iterator[tuple[int, int, Document]]:
    """The number of the novel, of the chapter in it, and the chapter."""
    for n, (path, _) in enumerate(self.inputs()):
      for novel in read(path, "", 2**20, advance):
        if isinstance(novel, Problem):
          raise Refused(f"{novel}; the embedded corpus is damaged: install bigtrain again")
        starts = [found.start() for found in CHAPTER.finditer(novel)]
        # The title page belongs to the first chapter.
        edges = [0, *starts[1:], len(novel)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
          yield n, i, Document(novel[start:end].strip(), held_out=i % 20 == 9)


@config
class Files:
  """Text files: .txt (a file is a document), .jsonl and .parquet (a line or row is one).

  .txt and .jsonl may be compressed (.gz, .zst).
  """

  pattern: str  # A folder (with all below it), a glob such as "data/**/*.jsonl.zst", or a file.
  # Held out: a share of the documents, chosen by a hash of their text; or the pattern of other
  # files, whose texts are then kept out of training. Equal texts are never on both sides.
  validation: float | str = 0.01
  text_field: str = "text"  # Of .jsonl and .parquet.
  max_bytes: int = 2**27  # Of one document; a longer one is bad input.
  on_error: Literal["skip", "refuse"] = "skip"  # Keep bad input out and report it, or stop at it.

  def check(self) -> None:
    if isinstance(self.validation, (int, float)) and not 0 <= self.validation < 1:
      raise Refused(
        f"validation is {self.validation}: a share is at least 0 and below 1; or give the "
        "pattern of the held-out files"
      )
    if self.max_bytes < 1:
      raise Refused(f"max_bytes is {self.max_bytes}: documents have at least 1 byte")
    self.inputs()

  def inputs(self) -> list[Input]:
    """The files in order of their paths.

    Raises:
      Refused: a pattern matches nothing, or a file is both training and held out.
    """
    files = expand(self.pattern)
    if not isinstance(self.validation, str):
      return [Input(path, None) for path in files]
    held_out = expand(self.validation)
    if both := sorted({p.resolve() for p in files} & {p.resolve() for p in held_out}):
      raise Refused(
        f"{both[0]} and {len(both) - 1} more are in both {self.pattern} and {self.validation}; "
        "held-out files must not be trained on"
      )
    return [Input(path, False) for path in files] + [Input(path, True) for path in held_out]

  def settings(self) -> str:
    share = "other files" if isinstance(self.validation, str) else float(self.validation)
    return f"files 1 {share} {self.text_field!r} {self.max_bytes} {self.on_error}"

  def documents(self, advance: Advance) -> Iterator[Document | Problem]:
    apart: set[int] = set()  # Hashes of what files of their own hold out; those come first.
    for path, held_out in sorted(self.inputs(), key=lambda i: i.held_out is not True):
      for found in read(path, self.text_field, self.max_bytes, advance):
        if not isinstance(found, Problem):
          found = self._document(path, held_out, found, apart)
        if isinstance(found, Problem) and self.on_error == "refuse":
          raise Refused(f"{found}; source.on_error='skip' keeps it out and goes on")
        yield found

  def _document(self, path, held_out: bool | None, text: str, apart: set[int]):
    """The document, or why it is none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    if held_out is None:
      return Document(text, number < float(self.validation) * 2**64)
    if held_out:
      apart.add(number)
    elif number in apart:
      return Problem(path, None, "also held out", f"it begins {shortened(text[:60])}")
    return Document(text, held_out)


@config
class PreparedText:
  """What `bigtrain data prepare` made: train and validation; the test split stays out."""

  path: str  # The folder.

  def check(self) -> None:
    self.inputs()

  def inputs(self) -> list[Input]:
    """The shards, training first.

    Raises:
      Refused: the folder is not there, not finished, or has lost files.
    """
    folder = pathlib.Path(self.path).expanduser()
    if not (folder / "manifest.json").is_file():
      why = "is not there" if not folder.is_dir() else "holds no finished preparation"
      raise Refused(
        f"{self.path} {why}: {command(f'data prepare CONFIG.py --out {self.path}', extra='data')} "
        "makes it"
      )
    names = list(self._digests())
    for name in names:
      if name != pathlib.PurePath(name).name:
        raise Refused(f"{self.path}/manifest.json names {name!r}, which is no shard of that folder")
      if not _is_file(folder / "shards" / name):
        raise Refused(f"{self.path} has lost its shard {name}: prepare it again")
    sides = {"train": False, "validation": True}
    chosen = [(name, sides[side]) for side in sides for name in names if name.startswith(side)]
    return [Input(folder / "shards" / name, held_out) for name, held_out in chosen]

  def settings(self) -> str:
    return "prepared 1"

  def _digests(self) -> dict[str, str]:
    """Of each shard, by the manifest."""
    folder = pathlib.Path(self.path).expanduser()
    found = read_json(folder / "manifest.json")
    shards = found.get("shards") if isinstance(found, dict) else None
    named = lambda s: isinstance(s, dict) and isinstance(s.get("file"), str) and "sha256" in s
    if not isinstance(shards, list) or not all(map(named, shards)):
      raise Refused(f"{self.path}/manifest.json is damaged: {self._again()}")
    return {s["file"]: s["sha256"] for s in shards}

  def _again(self) -> str:
    return (
      f"prepare it again, with {command(f'data prepare CONFIG.py --out {self.path}', extra='data')}"
    )

  def documents(self, advance: Advance) -> Iterator[Document | Problem]:
    from bigtrain.data.prepare.pack import read_shard

    digests = self._digests()
    for path, held_out in self.inputs():
      with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digests[path.name]:
          raise Refused(f"{path} is not what was prepared, it is damaged: {self._again()}")
      for record in read_shard(path):
        yield Document(record["text"], bool(held_out))
      advance(path.stat().st_size)


def _is_file(path: pathlib.Path) -> bool:
  try:
    return path.is_file()
  except (OSError, ValueError):  # No name that a file can have.
    return False


def check_apart(data: object) -> None:
  """Refuses sources of which one trains on a file that another one holds out, all or in part."""
  sources = [
    (p, s) for p, s in configs(data, "data") if isinstance(s, Austen | Files | PreparedText)
  ]
  sides: dict[pathlib.Path, tuple[str, object]] = {}
  for at, source in sources if len(sources) > 1 else ():
    share = source.validation if isinstance(source, Files) else None
    for path, held_out in source.inputs():
      side = share if held_out is None else held_out
      other, before = sides.setdefault(path.resolve(), (at, side))
      if before != side:
        raise Refused(
          f"{path} is trained on in one of {other} and {at} and held out in the other, all or in "
          "part: hold out the same in both"
        )


def expand(
  pattern: str, kind: Callable[[pathlib.Path], str] = kind_of, kinds: str = KINDS
) -> list[pathlib.Path]:
  """The files of a folder, glob or path, hidden ones left out, sorted.

  Raises:
    Refused: there are none, or none of a kind that is read; `kinds` says which are.
  """
  path = pathlib.Path(pattern).expanduser()
  wanted = glob.escape(str(path)) if path.exists() else str(path)
  found = glob.iglob(f"{wanted}/**" if path.is_dir() else wanted, recursive=True)
  files = sorted(p for p in map(pathlib.Path, found) if p.is_file())
  if not files:
    raise Refused(f"no files match {pattern}{near(path)}")
  if not any(kind(p) for p in files):
    raise Refused(f"{files[0]} is not {kinds}, as sources must be")
  return files


def missing(name: str) -> Refused:
  """What to raise where a file or folder of that name is not there."""
  return Refused(f"{name} is not there{near(pathlib.Path(name).expanduser())}")


def near(path: pathlib.Path) -> str:
  """The names nearest to the first part of the path that does not exist."""
  parent, name = pathlib.Path(path.anchor), ""
  for name in path.parts[bool(path.anchor) :]:
    if glob.has_magic(name) or not (parent / name).exists():
      break
    parent /= name
  if parent == path:
    return ": the folder is empty"
  if not parent.is_dir():
    return f": {parent} is a file"
  here = [p.name for p in parent.iterdir() if p.name[0] != "."]
  return f": {parent}/ has no {name}{nearest(name, here)}"
