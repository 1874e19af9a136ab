"""What the documentation says can be done: its code is run, its commands are parsed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from bigtrain import cli
from bigtrain.exit_codes import Exit
from bigtrain.load import functions, load
from bigtrain.validate import validate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:\w+=\S+ |.*uv run )+bigtrain (.*)$", README, re.M)


def text(page: str) -> str:
  return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.S | re.M)


def test_commands_in_the_docs_are_as_they_have_to_be_typed():
  for page in ("README.md", *map(str, (ROOT / "docs").glob("*.md"))):
    typed = re.findall(
      r"^ *bigtrain (?:train|evaluate|sample|diagnose|report|data|plan|parity|launch) .*",
      text(page),
      re.M,
    )
    assert not typed, f"{page}: after `uv run` bigtrain is not on the PATH"


@pytest.mark.smoke
def test_the_code_of_the_architecture_page_is_an_experiment_that_learns(tmp_path):
  path = tmp_path / "rotation.py"
  path.write_text("\n".join(blocks("docs/architecture.md", "python")))
  run = functions(path)["base"].__globals__["train"](tmp_path / "run")
  assert run.metrics["loss"][-1] < 0.01 * run.metrics["loss"][0]
  assert run.evaluations["eval/validation/hits"][-1] > 0.95
  assert (tmp_path / "run" / "heartbeat").read_text() == str(run.experiment.steps)
  corners = np.array([[0.5, 0.0], [0.0, 0.5]] * 4, np.float32)
  turned = np.array([[0.433, 0.25], [-0.25, 0.433]] * 4)  # By 30 degrees, counterclockwise.
  np.testing.assert_allclose(run.model(corners), turned, atol=0.1)


def test_the_experiment_in_the_readme_is_valid(tmp_path):
  (code,) = [c for c in blocks("README.md", "python") if "-> Experiment" in c]
  (tmp_path / "study.py").write_text(code)
  found = functions(tmp_path / "study.py")
  assert len(found) > 1
  for function in found.values():
    validate(function())


OF_EXPERIMENTS = ("train ", "parity ", "plan ")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("train ")])
def test_every_training_command_in_the_readme_names_a_valid_experiment(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  _, target, *arguments = shlex.split(command, comments=True)
  experiment, _ = load(target)
  if arguments != ["--help"]:
    _, experiment = cli.override(experiment, arguments, "bigtrain train")
  validate(experiment)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(OF_EXPERIMENTS)])
def test_every_command_about_a_run_in_the_readme_gets_as_far_as_its_run(
  command, monkeypatch, tmp_path, capsys
):
  monkeypatch.chdir(tmp_path)
  assert cli.main(shlex.split(command)) == Exit.REFUSED
  assert "runs/quickstart" in capsys.readouterr().err
