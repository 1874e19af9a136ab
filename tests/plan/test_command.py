"""bigtrain plan: what it refuses, prints and keeps."""

import json
import pathlib
import types

import pytest

from bigtrain import cli
from bigtrain.exit_codes import Exit
from bigtrain.plan import command, compile, report
from bigtrain.plan.compile import Compiled, Leaf
from bigtrain.plan.explain import Change, Traced
from tests.plan.snippets import links, module

STUDY = """
from bigtrain import Experiment
from tests.plan.test_search import study

def base() -> Experiment:
  return study()
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs the command on a study; the compiler is a program that was printed before."""
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("COLUMNS", "200")
  (tmp_path / "study.py").write_text(STUDY)
  asked = []

  def compile_step(experiment, topology):
    asked.append(experiment.batch)
    if experiment.batch == 999:
      return Compiled(topology, links("v5e:2x2", fsdp=4), "", {}, [], 1.0, "out of everything")
    memory = dict.fromkeys(
      (
        "argument",
        "output",
        "alias",
        "temp",
        "generated_code",
        "host_argument",
        "host_temp",
        "peak",
      ),
      2**20,
    )
    state = [Leaf("model.up_DF", 4096, (64, 64), (64, 32)), Leaf("optimizer.mu", 2, (2,), (2,))]
    text = (pathlib.Path(__file__).parent / "loops.hlo.txt").read_text()
    return Compiled(topology, links("v5e:2x2", fsdp=4), text, memory, state, 1.0)

  def run(*arguments):
    monkeypatch.setattr(compile, "compile_step", compile_step)
    try:
      code = cli.main(["plan", str(tmp_path / "study.py"), *arguments])
    except SystemExit as error:
      code = error.code
    out, err = capsys.readouterr()
    return types.SimpleNamespace(code=code, out=out, err=err, asked=asked)

  return run


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ([], "needs --topology, as in --topology v5p:2x2x4"),
    (["--topology", "v5ee:4x4"], "there is no chip 'v5ee'; did you mean 'v5e'?"),
    (
      ["--topology", "v5p:4x4"],
      "a v5p slice is a grid of 3 axes, each of a positive number of chips, as in v5p:4x4x4",
    ),
    (
      ["--topology", "v5e:4x"],
      "a v5e slice is a grid of 2 axes, each of a positive number of chips, as in v5e:4x4",
    ),
    (["--topology", "v5e:4x4", "--slices", "0"], "there is at least 1 slice"),
    (["--topology", "v5e:4x4", "--toplogy", "x"], "there is no flag --toplogy"),
  ],
)
def test_what_cannot_be_planned_is_refused(run, arguments, said):
  result = run(*arguments)
  assert result.code == Exit.REFUSED and said in result.err and not result.asked


def test_a_mesh_that_the_topology_does_not_make_is_refused_before_compiling(run, monkeypatch):
  real = compile.compile_step
  result = run("--help")
  assert result.code == 0
  with monkeypatch.context() as patch:
    patch.setattr(compile, "planned", real)
    said = run("--topology", "v5e:2x2", "--mesh.fsdp", "3").err
  assert "mesh wants 3 devices (data=1, fsdp=3, tensor=1) but 4 are in 1 x v5e:2x2" in said


def test_chips_without_their_compiler_are_refused_with_the_remedy(run, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(compile, "planned", compile.compile_step)
    patch.setattr("importlib.util.find_spec", lambda name: None)
    assert "uv run --extra cuda bigtrain" in run("--topology", "h100:8").err
    assert "uv run --python 3.12 --extra tpu bigtrain" in run("--topology", "v5e:2x2").err


def test_a_plan_is_made_once(run):
  first = run("--topology", "v5e:2x2", "--json")
  again = run("--topology", "v5e:2x2", "--json")
  assert first.code == Exit.DONE and first.out == again.out and first.asked == [16]
  assert run("--topology", "v5e:2x2", "--batch", "32").asked == [16, 32]
  assert run("--topology", "v5e:2x4").asked == [16, 32, 16]


def test_the_object_for_tools_has_the_sums_of_the_tables(run):
  plan = json.loads(run("--topology", "v5e:2x2", "--price", "2", "--json").out)
  assert plan["step_seconds"] == pytest.approx(sum(plan["parts"].values()))
  assert plan["chip_hours"] == pytest.approx(100 * plan["step_seconds"] / 3600 * 4)
  assert plan["dollars"] == pytest.approx(2 * plan["chip_hours"])
  assert plan["tokens_per_second"] == pytest.approx(16 * 256 / plan["step_seconds"])
  assert plan["mfu"] == pytest.approx(plan["flops"]["model"] / plan["step_seconds"] / 197e12)
  assert plan["memory"]["kinds"]["parameters"] == 64 * 128 * 2


def test_tables_and_the_program_are_written(run, tmp_path):
  out = run("--topology", "v5e:2x2", "--hlo", str(tmp_path / "hlo")).out
  for said in ("parameters", "up_DF", "matrix", "uncounted", "MFU", "chip-hours"):
    assert said in out
  assert module("loops").entry in (tmp_path / "hlo/step.hlo.txt").read_text()


def test_what_does_not_fit_fails_and_says_so_to_tools(run, monkeypatch):
  scores = Traced("block0.attention", "float32[8,512,512]", 2**23, ("dot_general",))
  monkeypatch.setattr(report, "largest", lambda *_: [scores])
  monkeypatch.setattr(report, "changes", lambda *_: [Change({"microbatches": 4}, 2e9, 1.1)])
  result = run("--topology", "v5e:2x2", "--batch", "999", "--json")
  assert result.code == Exit.CHECK
  found = json.loads(result.out)
  assert found["problem"] == "out of everything"
  assert found["arrays"][0]["bytes"] == 2**23
  assert found["changes"] == [{"settings": {"microbatches": 4}, "memory": 2e9, "slower": 1.1}]


def test_flags_of_a_search_are_not_passed_on():
  kept = ["--topology", "v5e:4x4", "--steps", "9"]
  words = [*kept[:2], "--search", "--few", "3", "--batches", "8", "16", *kept[2:], "--workers=2"]
  assert command._without(words, command.OF_SEARCH) == kept
