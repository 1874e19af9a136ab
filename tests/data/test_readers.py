import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bigtrain.config import Refused
from bigtrain.data.readers import Problem, read
from bigtrain.data.sources import Files


def texts_and_problems(path, limit=10_000):
  found = list(read(path, "text", limit, lambda n: None))
  return [f for f in found if isinstance(f, str)], [f for f in found if isinstance(f, Problem)]


def json_lines(*texts):
  return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write(path, data):
  path.write_bytes(data)
  return path


TEXTS = ["one", "zwei\nzeilen", "trois é 漢字 😀", "x" * 5000]
PACKERS = {
  "": lambda data: data,
  ".gz": gzip.compress,
  ".zst": zstandard.ZstdCompressor(write_content_size=False).compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_come_out_as_they_went_in(tmp_path, suffix):
  path = write(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](json_lines(*TEXTS)))
  assert texts_and_problems(path) == (TEXTS, [])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_joined_compressed_files_are_read_to_the_end(tmp_path, suffix):
  pack = PACKERS[suffix]
  data = pack(json_lines("one", "two")) + pack(json_lines("three"))
  assert texts_and_problems(write(tmp_path / f"a.jsonl{suffix}", data))[0] == [
    "one",
    "two",
    "three",
  ]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_text_file_is_one_document(tmp_path, suffix):
  path = write(tmp_path / f"a.txt{suffix}", PACKERS[suffix](TEXTS[2].encode()))
  assert texts_and_problems(path) == ([TEXTS[2]], [])


def test_parquet_rows_come_out_in_order_over_row_groups(tmp_path):
  texts = [f"row {i}" for i in range(50)]
  pyarrow.parquet.write_table(
    pyarrow.table({"id": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7
  )
  assert texts_and_problems(tmp_path / "a.parquet") == (texts, [])


@pytest.mark.parametrize(
  ("line", "kind"),
  [
    (b"not json", "not JSON"),
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "invalid UTF-8"),
    (b'{"other": "x"}', "no field 'text'"),
    (b'["x"]', "no field 'text'"),
    (b'{"text": 3}', "'text' is not text"),
    (b'{"text": ""}', "empty document"),
    (b"", "empty line"),
    (b"[" * 200_000, "too long"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "' + b"y" * 10_001 + b'"}', "too long"),
  ],
)
def test_a_bad_line_is_named_and_the_others_are_kept(tmp_path, line, kind):
  path = write(tmp_path / "a.jsonl", json_lines("a", "b") + line + b"\n" + json_lines("c"))
  texts, problems = texts_and_problems(path)
  assert texts == ["a", "b", "c"]
  assert [(p.file, p.line, p.kind) for p in problems] == [(path, 3, kind)]
  assert str(problems[0]).startswith(f"{path}:3: {kind}")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_keeps_its_whole_lines_and_is_named(tmp_path, suffix):
  texts = [f"text number {i}" for i in range(2000)]
  data = PACKERS[suffix](json_lines(*texts))
  found, problems = texts_and_problems(write(tmp_path / f"a.jsonl{suffix}", data[:-20]))
  assert found == texts[: len(found)]
  assert [(p.line, p.kind) for p in problems] == [(len(found) + 1, f"truncated {suffix}")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_named(tmp_path, suffix):
  path = write(tmp_path / f"a.txt{suffix}", b"this is no compressed file" * 10)
  assert [p.kind for p in texts_and_problems(path)[1]] == [f"damaged {suffix}"]


@pytest.mark.parametrize(
  ("name", "data", "kind", "line"),
  [
    ("a.txt", b"", "empty file", None),
    ("a.jsonl", b"", "empty file", None),
    ("a.parquet", b"", "empty file", None),
    ("a.parquet", b"PAR1 no parquet", "damaged .parquet", None),
    ("a.txt", b"one\ntwo\nthr\xffee", "invalid UTF-8", 3),
    ("a.txt", b"z" * 10_001, "too long", None),
    ("a.pdf", b"%PDF", "not .txt, .jsonl or .parquet", None),
  ],
)
def test_a_bad_file_is_named(tmp_path, name, data, kind, line):
  path = write(tmp_path / name, data)
  texts, problems = texts_and_problems(path)
  assert texts == []
  assert [(p.file, p.line, p.kind) for p in problems] == [(path, line, kind)]


def test_parquet_without_the_field_and_with_nulls_is_named(tmp_path):
  table = pyarrow.table({"text": ["a", None, "c"]})
  pyarrow.parquet.write_table(table, tmp_path / "nulls.parquet")
  texts, problems = texts_and_problems(tmp_path / "nulls.parquet")
  assert texts == ["a", "c"]
  assert [(p.line, p.kind) for p in problems] == [(2, "'text' is not text")]
  pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
  assert "found body" in str(texts_and_problems(tmp_path / "other.parquet")[1][0])


def test_every_byte_of_a_file_is_reported_as_progress(tmp_path):
  table = pyarrow.table({"text": [f"row {i}" for i in range(50)]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
  for path in (
    write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines(*TEXTS))),
    write(tmp_path / "long.txt", b"z" * 200_000),
    tmp_path / "a.parquet",
  ):
    seen = []
    list(read(path, "text", 10_000, seen.append))
    assert sum(seen) == path.stat().st_size


def test_refusing_names_file_line_and_remedy(tmp_path):
  path = write(tmp_path / "a.jsonl", json_lines("a") + b"oops\n")
  with pytest.raises(Refused, match=r"a\.jsonl:2: not JSON.*on_error='skip'"):
    list(Files(pattern=str(path), on_error="refuse").documents(lambda n: None))


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    ("{0}/bokos", "has no bokos; did you mean 'books'?"),
    ("{0}/books/a.txtt", "has no a.txtt; did you mean 'a.txt'?"),
    ("{0}/books/*.jsonl", "has no *.jsonl"),
    ("{0}/empty", "the folder is empty"),
    ("{0}/books/a.txt/b", "a.txt is a file"),
  ],
)
def test_a_wrong_path_is_refused_with_the_nearest_name(tmp_path, wrong, said):
  (tmp_path / "books").mkdir()
  (tmp_path / "empty").mkdir()
  write(tmp_path / "books" / "a.txt", b"a")
  with pytest.raises(Refused) as refused:
    Files(pattern=wrong.format(tmp_path)).check()
  assert said in str(refused.value)


def test_a_folder_and_a_glob_find_all_files_but_hidden_ones(tmp_path):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / ".git").mkdir()
  for name in ("b.txt", "deep/er/a.txt", ".hidden.txt", ".git/c.txt"):
    write(tmp_path / name, b"a")
  expected = [tmp_path / "b.txt", tmp_path / "deep/er/a.txt"]
  assert [p for p, _ in Files(pattern=str(tmp_path)).inputs()] == expected
  assert [p for p, _ in Files(pattern=f"{tmp_path}/**/*.txt").inputs()] == expected


def test_a_name_with_glob_characters_means_itself(tmp_path):
  (tmp_path / "a[1]").mkdir()
  path = write(tmp_path / "a[1]" / "b*.txt", b"a")
  for pattern in (path, path.parent):
    assert [p for p, _ in Files(pattern=str(pattern)).inputs()] == [path]


def test_files_that_are_trained_on_cannot_be_held_out(tmp_path):
  write(tmp_path / "a.txt", b"a")
  with pytest.raises(Refused, match="held-out files must not be trained on"):
    Files(pattern=str(tmp_path), validation=f"{tmp_path}/a.txt").check()
