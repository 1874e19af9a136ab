"""The short version of the fault-injection suite (tools/faults): each promise is kept."""

import json

import pytest

from tools.faults import suite
from tools.faults.__main__ import main, table
from tools.faults.result import Result

pytestmark = pytest.mark.usefixtures("prepared")
# Those that a minute is enough for; all others are slow.
QUICK = ("save-kill", "kill", "checkpoint-bit", "checkpoint-truncated", "data-bit", "data-deleted",
         "cache-bit", "malformed-input")  # fmt: skip
SHORT = [name for name, row in suite.SUITE.items() if row.short]


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SHORT],
)
def test_what_is_promised_of_a_fault_is_kept(name, tmp_path):
  found = [*suite.results(name, tmp_path, suite.SUITE[name].short, seed=1)]
  assert found and all(result.kept for result in found), [r for r in found if not r.kept]


def test_results_are_counted_by_kind(tmp_path):
  path = tmp_path / "results.jsonl"
  for kept, recovery in ((True, 2.0), (False, 31.5)):
    Result("kill", 0, "x", kept=kept, recovery=recovery, again=4).append(path)
  Result("torment-kill", 0, "x", kept=True).append(path)
  head, _, kill, torment = table(path).splitlines()
  assert head.startswith("| fault | promised | trials | kept")
  assert kill.endswith("| 2 | 1 | 0 | 0 | 4 steps at most | 31.5 s at most |")
  assert torment.startswith("| `torment-kill` |")


def test_a_part_of_the_suite_is_a_command(tmp_path, monkeypatch):
  results = tmp_path / "results.jsonl"
  words = ["--only", "malformed-input", "--times", "22", "--results", str(results)]
  monkeypatch.setattr("sys.argv", ["tools.faults", *words])
  main()
  lines = [json.loads(line) for line in results.read_text().splitlines()]
  assert {line["fault"] for line in lines} == {"malformed-input"} and len(lines) > 15
