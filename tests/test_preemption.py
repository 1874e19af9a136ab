"""SIGTERM to any process in any phase: all save at one step and leave, and no row is lost."""

import signal

import pytest

from bigtrain.exit_codes import Exit
from bigtrain.train import train
from tests import runs
from tests.test_multiprocess import compare

pytestmark = [pytest.mark.usefixtures("prepared")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The rows of one process with eight devices."""
  run = train(runs.base(), tmp_path_factory.mktemp("alone") / "run", quiet=True)
  return runs.read(run.directory.path, "metrics.jsonl")


def together(run_dir, processes: int, **environment) -> None:
  """All processes leave, and what is there is of one step."""
  all_of = [
    runs.start(run_dir, file="tests/troubled.py", **each, **environment)
    for each in (runs.joined(processes) if processes > 1 else [{"JAX_NUM_CPU_DEVICES": "8"}])
  ]
  ended = [runs.finish(process) for process in all_of]
  assert [code for code, _ in ended] == [Exit.LEFT] * processes, ended


def saved_and_rows(run_dir) -> int:
  saved = runs.saved(run_dir)[-1]
  assert runs.keys(run_dir)[-1][0] == saved
  return saved


@pytest.mark.slow
@pytest.mark.parametrize(
  "phase, processes, least",
  [("evaluate", 4, 11), ("evaluate", 1, 11), ("compile", 2, 1), ("save", 2, 6), ("save", 1, 6)],
)
def test_a_signal_in_a_phase_leads_all_to_save_and_leave(tmp_path, alone, phase, processes, least):
  together(tmp_path, processes, TROUBLE=f"{phase} {processes - 1}")
  assert least <= saved_and_rows(tmp_path) < 20
  assert len(runs.events(tmp_path, "signal")) == 1
  train(runs.base(), tmp_path, quiet=True, allow_changes=True)
  compare(tmp_path, alone)


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_restored_leads_all_to_leave(tmp_path, alone):
  together(tmp_path, 2, TROUBLE="save 1")
  first = saved_and_rows(tmp_path)
  together(tmp_path, 2, TROUBLE="restore 1")
  assert first < saved_and_rows(tmp_path) < 20
  train(runs.base(), tmp_path, quiet=True, allow_changes=True)
  compare(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["compile", "restore"])
def test_before_the_first_step_one_process_stops_at_once(tmp_path, alone, phase):
  if phase == "restore":
    together(tmp_path, 1, TROUBLE="save 0")
  before = runs.keys(tmp_path) if phase == "restore" else []
  together(tmp_path, 1, TROUBLE=f"{phase} 0")
  assert not before or runs.keys(tmp_path) == before
  train(runs.base(), tmp_path, quiet=True, allow_changes=True)
  compare(tmp_path, alone)


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_ends_all_processes(tmp_path):
  both = [runs.start(tmp_path, **each) for each in runs.joined(2)]
  runs.wait_until(both[1], lambda: runs.lines(tmp_path / "events.jsonl") > 2)  # It compiles.
  both[1].send_signal(signal.SIGINT)
  ended = [runs.finish(process) for process in both]
  assert [code for code, _ in ended] == [Exit.LEFT] * 2, ended
  assert runs.events(tmp_path, "left")[-1]["cause"] == "process 1 ended: stopped at once"
