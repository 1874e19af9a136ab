"""Readers: the texts in one file, and what in it is not a text, with file and line.

.txt, .jsonl and .parquet, the first two also as .gz and .zst. A reader never raises on what a file
holds: it yields a `Problem` and goes on with what can still be read.
"""

import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 2**16  # Bytes read at a time: a thousandfold compression still fits into memory.
Advance = Callable[[int], None]


class Problem(NamedTuple):
  """Input that was kept out."""

  file: pathlib.Path
  line: int | None  # From 1 (rows, in parquet); None is the whole file.
  kind: str  # The same words for the same cause: what problems are counted by.
  detail: str = ""

  def __str__(self) -> str:
    place = f"{self.file}:{self.line}" if self.line else f"{self.file}"
    return f"{place}: {self.kind}{f' ({self.detail})' if self.detail else ''}"


def kind_of(path: pathlib.Path) -> str:
  """`.txt`, `.jsonl` or `.parquet`; empty for a file that no reader knows."""
  suffixes = [s.lower() for s in path.suffixes[-2:]]
  if suffixes and suffixes[-1] in (".gz", ".zst"):
    suffixes.pop()
  elif suffixes and suffixes[-1] == ".parquet":
    return ".parquet"
  return suffixes[-1] if suffixes and suffixes[-1] in (".txt", ".jsonl") else ""


def read(path: pathlib.Path, field: str, limit: int, advance: Advance) -> Iterator[str | Problem]:
  """The texts of a file in order.

  Args:
    path: the file.
    field: where a JSON object or a parquet row has its text.
    limit: bytes that a text may have.
    advance: told how many bytes of the file have been read since the last time.
  """
  reader = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}.get(kind_of(path))
  if reader is None:
    yield Problem(path, None, "not .txt, .jsonl or .parquet")
  elif path.stat().st_size == 0:
    yield Problem(path, None, "empty file")
  else:
    yield from reader(path, field, limit, advance)


def _text(path, field, limit, advance) -> Iterator[str | Problem]:
  return text(path, limit, advance)


def text(path: pathlib.Path, limit: int, advance: Advance) -> Iterator[str | Problem]:
  """A file as one text."""
  for data in contents(path, limit, advance):
    yield data if isinstance(data, Problem) else checked(path, None, data, limit)


def contents(path: pathlib.Path, limit: int, advance: Advance) -> Iterator[bytes | Problem]:
  """A file as one piece of bytes, decompressed."""
  data, found = bytearray(), blocks(path, advance)
  for block in found:
    if isinstance(block, Problem):
      # The part before the damage is no whole document.
      yield block._replace(line=data.count(b"\n") + 1)
      return
    data += block
    if len(data) > limit:
      yield Problem(path, None, "too long", f"more than {limit} bytes")
      for _ in found:
        pass
      return
  yield bytes(data)


def _json_lines(path, field, limit, advance) -> Iterator[str | Problem]:
  # A JSON string spends at most six bytes ("\\u0000") on one byte of text.
  for line, data in lines(path, 6 * limit + 2**16, advance):
    if isinstance(data, Problem):
      yield data._replace(line=line)
      continue
    if not data.strip():
      yield Problem(path, line, "empty line")
      continue
    try:
      record = json.loads(data.decode())
    except UnicodeDecodeError as error:
      yield Problem(path, line, "invalid UTF-8", f"byte {error.start}")
    except (ValueError, RecursionError) as error:
      yield Problem(path, line, "not JSON", str(error).split(":")[0])
    else:
      yield _of_record(path, line, record, field, limit)


def _of_record(path, line, record, field, limit) -> str | Problem:
  if not isinstance(record, dict) or field not in record:
    found = ", ".join(list(record)[:5]) if isinstance(record, dict) else type(record).__name__
    return Problem(path, line, f"no field {field!r}", f"found {found}")
  if not isinstance(record[field], str):
    return Problem(path, line, f"{field!r} is not text", f"but {type(record[field]).__name__}")
  return checked(path, line, record[field], limit)


def checked(path, line, text: str | bytes, limit) -> str | Problem:
  """The text, if it is valid UTF-8 and not too long."""
  try:
    data, text = (text, text.decode()) if isinstance(text, bytes) else (text.encode(), text)
  except UnicodeDecodeError as error:
    return Problem(path, error.object.count(b"\n", 0, error.start) + 1, "invalid UTF-8")
  except UnicodeEncodeError as error:
    return Problem(path, line, "invalid UTF-8", f"a lone surrogate at character {error.start}")
  if len(data) > limit:
    return Problem(path, line, "too long", f"{len(data)} bytes, more than {limit}")
  return text if data else Problem(path, line, "empty document")


def lines(path, limit, advance) -> Iterator[tuple[int, bytes | Problem]]:
  """Numbered lines; of a line over `limit` bytes only a problem is kept in memory."""
  line, data, skipping = 1, bytearray(), False
  for block in blocks(path, advance):
    if isinstance(block, Problem):
      yield line, block
      return
    *ended, rest = block.split(b"\n")
    for part in ended:
      if not skipping:
        yield line, bytes(data + part)
      line, data, skipping = line + 1, bytearray(), False
    if not skipping:
      data += rest
    if len(data) > limit:
      yield line, Problem(path, None, "too long", f"a line of more than {limit} bytes")
      data, skipping = bytearray(), True
  if data:
    yield line, bytes(data)


def blocks(path: pathlib.Path, advance: Advance) -> Iterator[bytes | Problem]:
  """The bytes of a file, decompressed; a problem where it is damaged or ends too soon."""
  if path.suffix.lower() == ".gz":
    fresh = lambda: zlib.decompressobj(wbits=31)
  elif path.suffix.lower() == ".zst":
    import zstandard

    fresh = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
  else:
    fresh = None
  with path.open("rb") as file:
    decoder = None  # Of the current frame; None between frames.
    while data := file.read(BLOCK):
      advance(len(data))
      if fresh is None:
        yield data
        continue
      try:
        while data:
          decoder = decoder or fresh()
          if block := decoder.decompress(data):
            yield block
          data, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
      except Exception as error:  # zlib.error or ZstdError, without importing zstandard for it.
        yield Problem(path, None, f"damaged {path.suffix}", str(error))
        return
    if decoder is not None:
      yield Problem(path, None, f"truncated {path.suffix}", "it ends within a compressed frame")


def _parquet(path, field, limit, advance) -> Iterator[str | Problem]:
  import pyarrow
  import pyarrow.parquet

  try:
    file = pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowException, OSError) as error:
    yield Problem(path, None, "damaged .parquet", str(error).splitlines()[0])
    return
  with file:
    if field not in file.schema_arrow.names:
      yield Problem(
        path, None, f"no field {field!r}", "found " + ", ".join(file.schema_arrow.names)
      )
      return
    row, size, groups = 0, path.stat().st_size, file.num_row_groups
    for group in range(groups):
      try:
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[field]):
          for text in batch.column(0).to_pylist():
            row += 1
            yield _of_record(path, row, {field: text}, field, limit)
      except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Problem(path, row + 1, "damaged .parquet", f"row group {group}: {error}")
        row = sum(file.metadata.row_group(g).num_rows for g in range(group + 1))
      advance(size * (group + 1) // groups - size * group // groups)
    if not row:
      yield Problem(path, None, "empty file")
