"""What docs/launch.md says can be launched."""

import re
import shlex

import pytest

from bigtrain.cli import main
from bigtrain.exit_codes import Exit
from tests import runs

PAGE = (runs.ROOT / "docs" / "launch.md").read_text()
COMMANDS = re.findall(r"^uv run bigtrain launch (.*)$", PAGE, re.M)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split("--to ")[1].split()[0])
def test_every_command_of_the_page_renders(command, capsys, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  before, bare, after = command.partition(" -- ")
  words = [*shlex.split(before), *(["--dry_run"] * ("--dry_run" not in before))]
  assert main(["launch", *words, *(["--", *shlex.split(after)] if bare else [])]) == Exit.DONE
  assert "$ " in capsys.readouterr().out


def test_the_description_of_the_page_renders(capsys, monkeypatch, tmp_path):
  monkeypatch.setenv("WANDB_API_KEY", "correct-horse")
  monkeypatch.chdir(runs.ROOT)
  (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
  (tmp_path / "machines.py").write_text(code)
  given = re.findall(r"bigtrain launch (.*)", code)[0].replace(
    "machines.py", f"{tmp_path}/machines.py"
  )
  assert main(["launch", *shlex.split(given), "--dry_run"]) == Exit.DONE
  out = capsys.readouterr().out
  assert "#SBATCH --nodes=4\n" in out and "#SBATCH --gpus-per-node=8\n" in out
