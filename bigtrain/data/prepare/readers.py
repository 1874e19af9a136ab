"""Readers: the documents in one file of any kind that a preparation takes.

.txt, .md, .html (their text, by trafilatura), .jsonl, .parquet, .warc; all but .parquet also as .gz
and .zst. What cannot be read comes out as a `Problem` with its place, and the rest goes on.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bigtrain.data import readers
from bigtrain.data.readers import Problem

if TYPE_CHECKING:
  from bigtrain.data.prepare.recipe import Prepare

KINDS = ".txt, .md, .html, .jsonl, .warc (also .gz, .zst) or .parquet"
SNIFFED = 1024  # Bytes of a page without a type in which HTML begins.
WARC_CUT = 2**24  # Bytes of a web page that are looked at; longer ones are rejected.


def kind_of(path: pathlib.Path) -> str:
  """Such as `.html`; empty for a file that no reader knows."""
  suffixes = [s.lower() for s in path.suffixes[-2:]]
  if suffixes and suffixes[-1] in (".gz", ".zst"):
    suffixes.pop()
  own = {".md": ".txt", ".htm": ".html", ".html": ".html", ".warc": ".warc"}
  return own.get(suffixes[-1] if suffixes else "", "") or readers.kind_of(path)


def documents(
  path: pathlib.Path, recipe: "Prepare", advance: Callable[[int], None]
) -> Iterator[str | Problem]:
  """The texts in a file, in order.

  Args:
    path: the file.
    recipe: how to read it.
    advance: told how many bytes of the file have been read since the last time.
  """
  kind = kind_of(path)
  if not kind:
    yield Problem(path, None, f"not {KINDS}")
  elif path.stat().st_size == 0:
    yield Problem(path, None, "empty file")
  elif kind == ".txt":
    for text in readers.text(path, recipe.max_bytes, advance):
      if isinstance(text, Problem) or not recipe.split_at:
        yield text
      else:
        yield from pieces(text, re.compile(recipe.split_at, re.M))
  elif kind == ".html":
    for page in readers.contents(path, recipe.max_bytes, advance):
      yield page if isinstance(page, Problem) else _text_of(page, path, None)
  elif kind == ".warc":
    yield from _warc(path, recipe.max_bytes, advance)
  else:
    yield from readers.read(path, recipe.text_field, recipe.max_bytes, advance)


def pieces(text: str, begins: re.Pattern[str]) -> Iterator[str]:
  """The text cut before each line that matches; what is before the first goes with it."""
  starts = [found.start() for found in begins.finditer(text)]
  edges = [0, *starts[1:], len(text)]
  for start, end in itertools.pairwise(edges):
    yield text[start:end]


def _text_of(page: bytes, path: pathlib.Path, line: int | None) -> str | Problem:
  """The main text of a web page, without menus, headers and footers."""
  import trafilatura

  try:
    text = trafilatura.extract(page, include_comments=False, with_metadata=False)
  except (ValueError, RecursionError, LookupError) as error:
    return Problem(path, line, "unreadable HTML", str(error)[:200])
  return text or Problem(path, line, "HTML without text")


class _Blocks:
  """The decompressed bytes of a file as something that warcio can read from."""

  def __init__(self, path: pathlib.Path, advance: Callable[[int], None]):
    self._blocks = readers.blocks(path, advance)
    self._rest = b""
    self.problem: Problem | None = None

  def read(self, size: int = -1) -> bytes:
    while self.problem is None and (size < 0 or len(self._rest) < size):
      block = next(self._blocks, None)
      if block is None:
        break
      if isinstance(block, Problem):
        self.problem = block
      else:
        self._rest += block
    size = len(self._rest) if size < 0 else size
    data, self._rest = self._rest[:size], self._rest[size:]
    return data


def _cut_off(record) -> bool:
  """Whether the archive ends within the record, what is left of which is read."""
  left = lambda: getattr(record, "limit", 0)  # None is told where the record has no length.
  while left() > 0 and record.read(2**16):
    pass
  return left() > 0


def _status(record) -> str | None:
  """Of a response, such as 404."""
  return record.http_headers and record.http_headers.get_statuscode()


def _warc(path, limit, advance) -> Iterator[str | Problem]:
  """The pages among the responses of a web archive."""
  from warcio.archiveiterator import ArchiveIterator

  source = _Blocks(path, advance)
  number = 0
  try:
    for record in ArchiveIterator(source, arc2warc=False):
      number += 1
      if record.rec_type not in ("response", "conversion", "resource"):
        continue
      kind = ((record.http_headers or record.rec_headers).get_header("Content-Type") or "").lower()
      if (status := _status(record)) and not status.startswith("2"):
        yield Problem(path, number, "error page or redirect", f"HTTP status {status}")
        continue
      if kind and "html" not in kind and "text/plain" not in kind:
        yield Problem(path, number, "not a page", kind)
        continue
      cut = min(limit, WARC_CUT)
      page = record.content_stream().read(cut + 1)
      if not kind and b"<html" in page[:SNIFFED].lower():
        kind = "html"
      if not kind and record.rec_type == "response":
        yield Problem(path, number, "not a page", "no Content-Type, and no HTML")
      elif len(page) > cut:
        yield Problem(path, number, "too long", f"a page of more than {cut} bytes")
      elif _cut_off(record.raw_stream):
        if source.problem is None:
          yield Problem(path, number, "truncated .warc", "it ends within a record")
        break
      elif "html" in kind:
        yield _text_of(page, path, number)
      else:
        yield readers.checked(path, number, page, limit)
  except Exception as error:  # warcio raises many kinds.
    yield Problem(path, number + 1, "damaged .warc", str(error)[:200])
  if source.problem is not None:
    yield source.problem._replace(line=number)
