"""What other libraries raise is said in one message, and a step too large for a CPU is refused."""

import subprocess
import sys
import types
from typing import Any

import jax
import pytest

from bigtrain import cli, failures
from bigtrain.checkpoint import SaveFailed
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.failures import explained
from bigtrain.run_directory import RunDirectory
from bigtrain.train import train
from tests import runs, toys


@pytest.mark.parametrize(
  "text",
  [
    "RESOURCE_EXHAUSTED: Out of memory allocating 61648008729416 bytes.",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 61648008729416 bytes.\n[longer]",
  ],
)
def test_memory_that_is_full_is_one_line_with_what_helps(text, monkeypatch, capsys):
  def fail(_):
    raise jax.errors.JaxRuntimeError(text)

  monkeypatch.setattr(cli, "train", fail)
  assert cli.main(["train"]) == Exit.FAILED
  (line,) = capsys.readouterr().err.splitlines()
  assert "memory is full where 61648.0 GB more were wanted" in line
  assert "a smaller batch" in line and "microbatches" in line and "remat" in line


def test_a_full_disk_is_not_taken_for_a_full_device():
  error = SaveFailed("a checkpoint could not be saved in x: RESOURCE_EXHAUSTED: No space left")
  assert explained(error) == (str(error), Exit.FAILED)


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch):
  def fail(_):
    raise ValueError("of our own")

  monkeypatch.setattr(cli, "train", fail)
  with pytest.raises(ValueError, match="of our own"):
    cli.main(["train"])


def test_what_follows_a_failed_checkpoint_is_silent_and_nothing_else(monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
  for text in ("Event loop is closed", "of our own"):
    found: Any = types.SimpleNamespace(exc_value=RuntimeError(text))
    failures.unraisable(found)
  assert shown == [found]


def test_a_variable_that_jax_does_not_take_is_refused_by_name():
  code = "import sys; from bigtrain.cli import main; sys.exit(main(['train', 'tests/runs.py']))"
  command = ["env", "JAX_NUM_CPU_DEVICES=abc", sys.executable, "-c", code]
  done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == Exit.REFUSED
  assert done.stderr.startswith("bigtrain: JAX_NUM_CPU_DEVICES is 'abc'")
  assert done.stderr.count("\n") == 1


def test_a_store_without_its_package_is_refused_by_the_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(ImportError) as error:
    RunDirectory("gs://nowhere/x").begin(toys.experiment(), None, allow_changes=False)
  assert explained(error.value) == (
    "gs:// needs another package: pip install gcsfs",
    Exit.REFUSED,
  )


@pytest.mark.usefixtures("prepared")
def test_a_step_that_takes_more_memory_than_the_machine_has_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(failures, "physical_memory", lambda: 1000)
  with pytest.raises(
    Refused, match=r"takes .* GB of memory and this machine has 0.0: take a small"
  ):
    train(runs.base(), tmp_path, quiet=True)
