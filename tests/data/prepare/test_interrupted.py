"""Stopped at any moment, the same command goes on: nothing is done twice, and the bytes are those
of a preparation that was never stopped."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("datatrove")

from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.run import prepare
from bigtrain.exit_codes import Exit
from bigtrain.load import load
from tests.data.prepare.corpus import contents, document, jsonl

RECIPE = """
import time
from bigtrain.config import config
from bigtrain.data.prepare.engine import Local
from bigtrain.data.prepare.recipe import NearDuplicates, Prepare
from bigtrain.data.prepare.steps import Repair, Step, Whitespace
from bigtrain.data.tokenizers import BPE

@config
class Slow(Step):
  '''Takes its time, and is of the recipe's own file.'''
  seconds: float = 0.02
  def make(self):
    def apply(text):
      time.sleep(self.seconds)
      return text
    return apply

def base() -> Prepare:
  return Prepare(
    inputs=({inputs!r},), steps=(Repair(), Whitespace(), Slow()), tasks=4,
    near=NearDuplicates(bands=4),
    tokenizer=BPE(vocab=300), validation=0.2, engine=Local(workers=2),
  )
"""


class Command:
  """`bigtrain data prepare` in a process group of its own, as a shell starts it."""

  def __init__(self, file: pathlib.Path, out: pathlib.Path):
    command = [
      sys.executable,
      "-m",
      "bigtrain.cli",
      "data",
      "prepare",
      str(file),
      "--out",
      str(out),
    ]
    self.out = out
    self.process = subprocess.Popen(
      command, stderr=subprocess.PIPE, text=True, start_new_session=True
    )

  def until(self, stage: str) -> None:
    """Waits until a task of the stage is done, or all is."""
    marks = self.out / "work" / "stages" / stage / "completions"
    while not (marks.is_dir() and any(marks.iterdir())) and self.process.poll() is None:
      time.sleep(0.01)

  def end(self) -> tuple[int, str]:
    _, said = self.process.communicate(timeout=100)
    return self.process.returncode, said


def marks(out: pathlib.Path) -> dict[str, int]:
  """When each finished task was."""
  found = (out / "work" / "stages").glob("*/completions/*")
  return {f"{p.parent.parent.name} {p.name}": p.stat().st_mtime_ns for p in found}


def workers_of(out: pathlib.Path) -> list[str]:
  """Processes that hold files of the folder open."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
    try:
      if os.readlink(path).startswith(str(out)):
        found.append(path.parts[2])
    except OSError:
      pass
  return found


def test_killed_at_any_moment_the_same_command_goes_on(tmp_path):
  for i in range(4):
    jsonl(tmp_path / "in" / f"{i}.jsonl", [document(100 * i + j) for j in range(25)])
  file, out = tmp_path / "recipe.py", tmp_path / "out"
  file.write_text(RECIPE.format(inputs=str(tmp_path / "in")))

  command = Command(file, out)
  command.until("clean")
  os.killpg(command.process.pid, signal.SIGINT)  # Ctrl-C goes to all of them.
  code, said = command.end()
  assert code == Exit.LEFT
  first, *stages, last = said.splitlines()
  assert first.startswith(f"bigtrain: preparing 4 files in {out}, by ")
  assert len(stages) <= 1 and all(line.startswith("bigtrain: clean: ") for line in stages)
  assert last == "bigtrain: stopped; the same command goes on"

  finished = marks(out)
  assert any(name.startswith("clean") for name in finished) and len(finished) < 20
  for stage in ("signatures", "pack"):
    command = Command(file, out)
    command.until(stage)
    command.process.kill()
    code, _ = command.end()
    assert marks(out).items() >= finished.items(), "a finished task was done again"
    finished = marks(out)
    deadline = time.time() + 5
    while (left := workers_of(out)) and time.time() < deadline:
      time.sleep(0.05)
    assert not left, "a worker outlives its command"

  code, said = Command(file, out).end()
  assert code == Exit.DONE and "report.html" in said
  lines = [line for line in said.splitlines() if "tasks are done" not in line]
  assert len(lines) == 2
  assert marks(out).items() >= finished.items()
  assert not list(out.rglob("*.part"))
  recipe, source = load(str(file), Prepare)
  recipe.engine.workers, recipe.steps[2].seconds = 1, 0.02
  prepare(recipe, tmp_path / "other", source.file)
  assert contents(out) == contents(tmp_path / "other")
