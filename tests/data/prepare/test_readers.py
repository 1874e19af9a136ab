"""Every kind of file is read, and what is wrong with one is told with its place."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

pytest.importorskip("datatrove")

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from bigtrain.data.prepare.readers import documents
from bigtrain.data.prepare.run import prepare
from tests.data.prepare.corpus import document, kept, recipe, rejected, report

NAV = "<nav><a href='/'>Home</a> <a href='/about'>About us</a></nav>"


def page(text: str) -> bytes:
  """A web page as they are: the text in an article, among menus and footers."""
  paragraphs = "".join(f"<p>{text} {i}.</p>" for i in ("one", "two", "three"))
  body = f"<header>{NAV}</header><article><h1>Title</h1>{paragraphs}</article>"
  return (
    f"<html><head><title>t</title></head><body>{body}<footer>Imprint</footer></body></html>"
  ).encode()


def warc(compressed: bool, responses) -> bytes:
  """A web archive of (content type, body[, status]), with a request that is no document."""
  file = io.BytesIO()
  writer = WARCWriter(file, gzip=compressed)
  uri = "http://example.org/"
  for kind, body, *status in responses:
    types = [("Content-Type", kind)] if kind else []
    headers = StatusAndHeaders(*status or ["200 OK"], types, protocol="HTTP/1.1")
    request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "example.org")], is_http_request=True)
    writer.write_record(writer.create_warc_record(uri, "request", http_headers=request))
    record = writer.create_warc_record(
      uri, "response", payload=io.BytesIO(body), http_headers=headers
    )
    writer.write_record(record)
  return file.getvalue()


def test_every_kind_of_file_is_read(tmp_path):
  texts = {name: f"Of {name}: {document(i)}" for i, name in enumerate(
    ("txt", "gz", "md", "html", "htm", "jsonl", "jgz", "zst", "parquet", "warc", "wgz", "plain")
  )}  # fmt: skip
  line = lambda name: (json.dumps({"text": texts[name]}) + "\n").encode()
  html = "text/html; charset=utf-8"
  image = ("image/png", b"\x89PNG")
  files = {
    "a.txt": texts["txt"].encode(),
    "b.txt.gz": gzip.compress(texts["gz"].encode()),
    "c.md": f"# Title\n\n{texts['md']}".encode(),
    "d.html": page(texts["html"]),
    "e.HTM": page(texts["htm"]),
    "f.jsonl": line("jsonl"),
    "g.jsonl.gz": gzip.compress(line("jgz")),
    "h.jsonl.zst": zstandard.compress(line("zst")),
    "j.warc": warc(False, [(html, page(texts["warc"])), image]),
    "k.warc.gz": warc(True, [(html, page(texts["wgz"])), ("text/plain", texts["plain"].encode())]),
  }
  (tmp_path / "in").mkdir()
  for name, data in files.items():
    (tmp_path / "in" / name).write_bytes(data)
  pyarrow.parquet.write_table(
    pyarrow.table({"id": [1], "text": [texts["parquet"]]}), tmp_path / "in" / "i.parquet"
  )
  prepare(recipe(tmp_path / "in"), tmp_path / "out")
  found = list(kept(tmp_path / "out"))
  for name, text in texts.items():
    assert sum(text in f for f in found) == 1, name
  assert len(found) == len(texts)
  assert [r["reason"] for r in rejected(tmp_path / "out")] == ["not a page"]  # The image.
  for menu in ("Home", "About us", "Imprint"):
    assert not any(menu in f for f in found)
  # All bytes of all files but parquet's, whose columns are read.
  assert report(tmp_path / "out")["steps"][0]["read_bytes"] >= sum(map(len, files.values()))


def test_a_truncated_archive_gives_what_is_before_the_damage(tmp_path):
  pages = [("text/html", page(f"Page {i} {document(i)}")) for i in range(40)]
  whole, plain = warc(True, pages), warc(False, pages)
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "cut.warc.gz").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "in" / "cut.warc").write_bytes(plain[: plain.index(b"Page 20") + 50])
  (tmp_path / "in" / "noise.warc").write_bytes(b"this is no archive\n" * 100)
  (tmp_path / "in" / "noise.parquet").write_bytes(b"nor is this a table\n" * 100)
  prepare(recipe(tmp_path / "in"), tmp_path / "out")
  texts = kept(tmp_path / "out")
  assert 15 <= len(texts) <= 20 and all(t.count("three.") == 1 for t in texts)
  wrong = [r for r in rejected(tmp_path / "out") if r["step"] == "read"]
  found = {r["id"].split("/")[-1].split("#")[0]: r["reason"] for r in wrong}
  assert found["cut.warc.gz"] == "truncated .gz" and found["cut.warc"] == "truncated .warc"
  assert found["noise.warc"] == "damaged .warc" and found["noise.parquet"] == "damaged .parquet"


def test_of_a_web_archive_every_response_is_a_document_or_counted(tmp_path):
  body = lambda name: page(f"Of {name}: {document(len(name))}")
  responses = [
    ("Text/HTML; Charset=UTF-8", body("capitals")),
    (None, b"\n<!doctype html>" + body("untyped")),
    (None, b"GIF89a"),
    ("application/pdf", b"%PDF"),
    ("text/html", body("missing"), "404 Not Found"),
    ("text/html", body("moved"), "301 Moved Permanently"),
  ]
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.warc").write_bytes(warc(False, responses))
  found = list(documents(tmp_path / "in" / "a.warc", recipe(tmp_path / "in"), lambda n: None))
  for name, text in zip(("capitals", "untyped"), found[:2], strict=True):
    assert f"Of {name}" in text
  error, other = "error page or redirect", "not a page"
  assert [problem.kind for problem in found[2:]] == [other, other, error, error]
  assert "HTTP status 404" in str(found[4]) and "a.warc:" in str(found[4])


def test_a_text_file_is_cut_into_documents(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "novel.txt").write_text("Title\nCHAPTER 1\nIt is.\nCHAPTER 2\nIt was.\n")
  prepare(recipe(tmp_path / "in", split_at=r"^CHAPTER \d+$"), tmp_path / "out")
  assert set(kept(tmp_path / "out")) == {"Title\nCHAPTER 1\nIt is.", "CHAPTER 2\nIt was."}
