"""What the loop promises to whatever stands around the step."""

import json
import types

import jax
import pytest

from bigtrain.config import Refused
from bigtrain.evaluate import Evaluating
from bigtrain.experiment import Checkpoints
from bigtrain.incidents import Incidents
from bigtrain.mesh import Mesh
from bigtrain.metrics import Recorder
from bigtrain.optim.schedule import Constant
from bigtrain.optim.sgd import SGD
from bigtrain.parts import Part, Profiler, Saver, Signals, default_parts
from bigtrain.replay import Replay
from bigtrain.self_check import SelfCheck
from bigtrain.train import train
from tests import packed


class Diary(Part):
  """Writes down every call; fails at the step that it is told to."""

  def __init__(self, fails_at=None):
    self.calls, self.fails_at = [], fails_at

  def start(self, run, step):
    super().start(run, step)
    self.calls.append(("start", step))

  def before_step(self, step):
    self.calls.append(("before", step))

  def after_step(self, step, metrics):
    self.calls.append(("after", step))
    if step == self.fails_at:
      raise ValueError("planted")

  def on_away(self, phase):
    self.calls.append(("away", phase))

  def close(self):
    self.calls.append(("close",))


def experiment():
  e = packed.experiment(
    optimizer=SGD(lr=0.1, schedule=Constant()),
    mesh=Mesh(data=8, fsdp=1),
    model={"layers": 1},
    steps=3,
  )
  e.checkpoints = Checkpoints(every=2)
  return e


def test_every_part_is_called_around_each_step_and_before_whatever_else_takes_time(tmp_path):
  first, second = Diary(), Diary()
  train(experiment(), tmp_path / "run", quiet=True, parts=[first, second])
  assert first.calls == second.calls
  assert first.calls == [
    ("start", 0),
    *[("before", 0), ("away", "compile"), ("after", 1)],
    *[("before", 1), ("away", "save"), ("after", 2)],  # Before the parts that are added.
    *[("before", 2), ("away", "evaluate"), ("away", "save"), ("after", 3)],
    ("close",),
  ]


def test_a_failing_part_ends_the_run_with_its_error_recorded_and_every_part_closed(tmp_path):
  other = Diary()
  with pytest.raises(ValueError, match="planted"):
    train(experiment(), tmp_path / "run", quiet=True, parts=[Diary(fails_at=1), other])
  assert other.calls[-1] == ("close",) and ("after", 1) not in other.calls
  events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
  assert [e["error"] for e in events if e["event"] == "error"] == ["ValueError: planted"]


def test_evaluation_stands_before_saving_so_that_its_rows_belong_to_the_checkpoint():
  kinds = [Signals, Replay, Recorder, Incidents, SelfCheck, Evaluating, Saver]
  assert [*map(type, default_parts())] == kinds


def test_a_profile_of_no_steps_is_refused():
  with pytest.raises(Refused, match=r"profile\.steps 0: from 0 on, and 1 step or more"):
    Profiler(4, 0)


@pytest.mark.parametrize(("last", "traced"), [(9, [4, 5]), (5, [4])])
def test_the_profiler_traces_the_steps_asked_for_and_ends_with_the_run(
  monkeypatch, tmp_path, last, traced
):
  tracing, steps, events = [], [], []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: tracing.append(path))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: tracing.pop())
  directory = types.SimpleNamespace(path=tmp_path, event=lambda name, **f: events.append((name, f)))
  profiler = Profiler(4, 2)
  run = types.SimpleNamespace(directory=directory, experiment=types.SimpleNamespace(steps=last))
  profiler.start(run, 0)
  for step in range(last):
    profiler.before_step(step)
    if tracing:
      assert tracing == [str(tmp_path / "profile")]
      steps.append(step)
    profiler.after_step(step + 1, {})
  profiler.close()
  profiler.close()
  assert steps == traced and tracing == []
  assert events == [("profile", {"first": 4, "last": 6})]


@pytest.mark.parametrize(("step", "said"), [(5, ["5 to 8"]), (4, []), (0, [])])
def test_a_profile_that_this_start_does_not_reach_is_told(step, said):
  told = []
  run = types.SimpleNamespace(say=told.append, experiment=types.SimpleNamespace(steps=9))
  Profiler(4, 2).start(run, step)
  assert [line[-6:] for line in told] == said
