"""What a record may hold, whoever wrote it: what is read can be written, and reckoned with."""

import json

import pytest
from etils import epath

from bigtrain.columns import columns
from bigtrain.lines import read_events, read_object, read_rows

EVENT = {"time": 5.0, "event": "save", "step": 4, "seconds": 0.5}
ROW = {"step": 1, "kind": "train", "time": 5.0, "loss": 2.0}
MANY = 10**400


def written(path, *records) -> epath.Path:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return epath.Path(path)


@pytest.mark.parametrize(
  "wrong",
  [
    {"step": 4.5}, {"step": -1}, {"step": MANY}, {"step": 2**60}, {"step": "x"}, {"step": True},
    {"time": 1e18}, {"time": -5.0}, {"time": None}, {"time": MANY}, {"time": float("nan")},
    {"phase": ["x"]}, {"cause": {}}, {"process": [1]},
    {"seconds": 1e18}, {"until": -1}, {"event": 3}, {"event": "rollback"}, {"devices": 2.0},
  ],
)  # fmt: skip
def test_an_event_that_cannot_be_is_left_out(wrong, tmp_path):
  assert read_events(written(tmp_path / "x", EVENT, EVENT | wrong, [EVENT])) == [EVENT]


def test_a_field_of_an_event_that_is_not_known_is_not_there(tmp_path):
  assert read_events(written(tmp_path / "x", EVENT | {"until": None, "path": None})) == [
    EVENT | {"path": None}
  ]


@pytest.mark.parametrize("step", [MANY, 10**30, -5, 1.0, None])
def test_a_row_of_no_step_is_left_out(step, tmp_path):
  assert read_rows(written(tmp_path / "x", ROW, ROW | {"step": step})) == [ROW]


@pytest.mark.parametrize("number", [MANY, 1.7e308, float("inf"), "high", [1], True])
def test_of_a_row_the_numbers_are_read(number, tmp_path):
  (row,) = read_rows(written(tmp_path / "x", ROW | {"loss": number, "x": 10**30, "y": None}))
  assert row == {"step": 1, "kind": "train", "time": 5.0, "x": 1e30, "y": None}
  assert all(values.dtype.kind in "if" for values in columns([row]).values())


@pytest.mark.parametrize("time", [None, 1e18, "now"])
def test_a_row_may_have_no_time(time, tmp_path):
  assert "time" not in read_rows(written(tmp_path / "x", ROW | {"time": time}))[0]


def test_text_that_is_read_can_be_written(tmp_path):
  path = tmp_path / "x"
  path.write_text(r'{"\ud800": ["\udfff", "é\ud83d\ude00"]}')
  assert read_object(epath.Path(path)) == {"?": ["?", "é😀"]}
  path.write_bytes(b'{"a": "\xed\xa0\x80"}')
  json.dumps(read_object(epath.Path(path)), ensure_ascii=False).encode()


def test_what_nests_deeper_than_any_record_is_none(tmp_path):
  for depth in (100, 800, 100_000):
    (tmp_path / "x").write_text('{"a":' * depth + "1" + "}" * depth)
    assert read_object(epath.Path(tmp_path / "x")) == {}
  assert read_object(epath.Path(tmp_path / "none")) == read_object(epath.Path(tmp_path)) == {}
