"""The command `bigtrain parity`: what it prints, refuses and returns, over one process and two."""

import json
import os
import subprocess
import sys

import jax
import pytest

from bigtrain import cli, sharding
from bigtrain.exit_codes import Exit
from bigtrain.parity.report import Report, Tensor


@pytest.fixture(scope="module", autouse=True)
def begun():
  """jax has its eight devices before the command asks for as many as it wants."""
  assert len(jax.devices()) == 8


def run(capsys, *arguments) -> tuple[int, str]:
  code = cli.main(["parity", *arguments])
  return code, capsys.readouterr().out


def test_the_command_prints_a_table_and_says_equal(capsys):
  code, out = run(capsys, "experiments/mlp.py", "--mesh.fsdp", "4", "--rows", "3")
  assert code == Exit.DONE
  assert out.splitlines()[0].split()[:2] == ["what", "name"] and "\n... and " in out
  assert "steps on the mesh (fsdp=2) and on one device" in out.splitlines()[-1]


def test_the_command_fails_with_the_name_of_what_differs_also_as_json(capsys, monkeypatch):
  use = sharding.use

  def planted(w, dims, *args, **kwargs):
    w = w[...] if dims != "FC" or jax.sharding.get_abstract_mesh().empty else w[...] * 1.001
    return use(w, dims, *args, **kwargs)

  monkeypatch.setattr(sharding, "use", planted)
  code, out = run(capsys, "experiments/mlp.py", "--mesh.fsdp", "4", "--json")
  found = json.loads(out)
  assert (code, found["equal"], found["mesh"]) == (Exit.CHECK, False, {"fsdp": 2})
  assert found["first"]["name"] == "layers.2.weight", found["first"]["said"]
  assert 5e-4 < found["first"]["difference"] < 5e-3


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--mesh.fsdp", "1"], "parity compares a mesh with one device"),
    (["--mesh.fsdp", "3"], "batch 32 is not divisible by the 3 batch shards"),
    (["--mesh.fsdp", "3"], "the mesh's fsdp=3; use 126 or 129, or set --mesh.fsdp 2"),
    (["--mesh.fsdp", "0"], "one axis at most is -1 (what is left); set --mesh.fsdp 1 or more"),
    (["--mesh.fsdp=1", "--mesh.sequence"], "set --mesh.tensor 2 or more, or --mesh.no_sequence"),
    (["--mesh.tensr", "2"], "did you mean --mesh.tensor?"),
  ],
)
def test_the_command_refuses_what_it_cannot_compare(arguments, message, capsys):
  assert cli.main(["parity", "experiments/mlp.py", *arguments]) == Exit.REFUSED
  assert message in capsys.readouterr().err


def test_experts_that_a_mesh_does_not_divide_are_named_with_a_mesh_that_does(capsys):
  assert cli.main(["parity", "experiments/moe.py", "--mesh.expert", "3"]) == Exit.REFUSED
  said = capsys.readouterr().err
  cause = "feed_forward.experts 8 is not divisible by 3, the mesh's expert=3; use 6 or 9"
  assert f"{cause}, or set --mesh.expert 2" in said


def test_the_table_is_as_wide_as_other_commands_tables_are_in_a_pipe(capsys, monkeypatch):
  monkeypatch.delenv("COLUMNS", raising=False)
  Report({}, [Tensor("optimizer", "of" * 50)], list).print(1)
  assert "of" * 50 in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_makes_its_own_devices_on_one_core_for_all_axes_together(tmp_path):
  axes = ("slices", "data", "fsdp", "tensor")
  arguments = [f"--mesh.{axis}=2" for axis in axes]
  command = [sys.executable, "-m", "bigtrain.cli", "parity", "experiments/llama3.py:windowed"]
  core = {min(os.sched_getaffinity(0))}
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "BIGTRAIN_CACHE": str(tmp_path)}
  environment.pop("XLA_FLAGS")
  pin = lambda: os.sched_setaffinity(0, core)
  done = subprocess.run(
    [*command, *arguments], env=environment, preexec_fn=pin, capture_output=True, text=True
  )
  assert done.returncode == Exit.DONE, done.stdout + done.stderr
  assert f"({', '.join(f'{axis}=2' for axis in axes)})" in done.stdout


def over_processes(tmp_path, *arguments) -> tuple[int, str, str]:
  """The exit code of the command over two processes, and what it wrote on both streams."""
  command = [sys.executable, "-m", "bigtrain.cli", "parity", *arguments, "--processes=2"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "BIGTRAIN_CACHE": str(tmp_path)}
  environment.pop("XLA_FLAGS")
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
  return done.returncode, done.stdout, done.stderr


def test_two_processes_find_a_fault_too(tmp_path):
  code, out, err = over_processes(tmp_path, "tools/benchmarks/faulty.py", "--mesh.data=4", "--json")
  assert code == Exit.CHECK, err
  assert json.loads(out)["first"]["name"] == "up_IF"


@pytest.mark.parametrize(
  ("axis", "message"), [("--mesh.fsdp=1", "this mesh is one device"), ("--mesh.fsdp=3", "use 30")]
)
def test_two_processes_refuse_what_one_refuses_and_say_it_once(axis, message, tmp_path):
  code, out, err = over_processes(tmp_path, "experiments/mlp.py", axis)
  assert code == Exit.REFUSED and (out + err).count(message) == 1, out + err


FAILS = """
import dataclasses, os, signal
from bigtrain.config import config
from bigtrain.objectives.classification import Classification
from tools.benchmarks import faulty

@config
class Failing(Classification):
  def __call__(self, model, batch, key):
    if os.environ.get("BIGTRAIN_PROCESS") == "{process}":
      {how}
    return Classification.__call__(self, model, batch, key)

def base():
  return dataclasses.replace(faulty.sound(), objective=Failing())
"""
HOW = {
  "raise": 'raise ZeroDivisionError("the eleventh column is empty")',
  "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  ("process", "how", "said"),
  [
    (1, "raise", "process 1 of 2 (they count from 0) ended with exit code 1; its last words: Zero"),
    pytest.param(1, "killed", "process 1 of 2 (they count from 0) ended by signal 9", marks=SLOW),
    pytest.param(0, "raise", "bigtrain: ZeroDivisionError: the eleventh column", marks=SLOW),
  ],
)
def test_a_process_that_fails_ends_all_and_its_reason_is_said(process, how, said, tmp_path):
  file = tmp_path / "failing.py"
  file.write_text(FAILS.format(process=process, how=HOW[how]))
  code, out, err = over_processes(tmp_path, str(file), "--mesh.data=4")
  assert code == Exit.FAILED and said in err.splitlines()[-1], out + err
  if how == "raise":
    assert "in __call__" in err and "the eleventh column is empty" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("experiment", "axes"),
  [
    ("experiments/gpt2.py", {"fsdp": 2, "tensor": 2}),
    ("experiments/llama3.py:windowed", {"context": 4, "fsdp": 2}),
    ("experiments/moe.py", {"expert": 2, "data": 2}),
    ("experiments/gpt2.py", {"pipeline": 2, "data": 2}),
  ],
  ids=["fsdp-tensor", "context-fsdp", "expert-data", "pipeline-data"],
)
def test_two_processes_compute_what_one_device_computes(experiment, axes, tmp_path):
  sizes = {"fsdp": 1} | axes
  mesh = (f"--mesh.{axis}={n}" for axis, n in sizes.items())
  code, out, err = over_processes(tmp_path, experiment, *mesh)
  assert code == Exit.DONE, out + err
