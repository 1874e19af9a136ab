"""Processes that cannot run together are told so at once, each of them, with the host's name."""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
from etils import epath

from bigtrain import cli, preflight
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from tests import runs
from tests.test_processes import free_port

# What is particular to the second of two hosts, where both run the same command.
PARTICULAR = {
  "version": """
true = metadata.version
patch.setattr(metadata, "version", lambda name: "9.9" if name == "optax" else true(name))
""",
  "code": """
patch.setattr(preflight, "_code", lambda: 7)
""",
  "file": """
changed = pathlib.Path(sys.argv[1]) / "runs.py"
changed.write_text(pathlib.Path("tests/runs.py").read_text() + "SCALE = -3.0\\n")
arguments[1] = str(changed)
""",
  "module": """
changed = pathlib.Path(sys.argv[1]) / "bigram.py"
changed.write_text("SCALE = -3.0\\n")
patch.setattr(sys.modules["tests.bigram"], "__file__", str(changed))
""",
  "watched": """
(pathlib.Path(sys.argv[1]) / "watcher.py").write_text("")
patch.syspath_prepend(sys.argv[1])
import watcher
""",
  "flags": """
patch.setenv("XLA_FLAGS", "--xla_dump_to=/here " + os.environ.get("XLA_FLAGS", "") + " --new")
""",
  "folder": """
arguments[-1] += "-elsewhere"
""",
  "read_only": """
def read_only(*_):
  raise OSError(30, "Read-only file system")
patch.setattr(type(epath.Path("/")), "write_text", read_only)
""",
  "stale": """
def stale(*_):
  raise OSError(116, "Stale file handle")
patch.setattr(type(epath.Path("/")), "write_text", stale)
""",
  "data": """
patch.setattr(Text, "digest", lambda self: "other")
""",
  "no_data": """
def gone(self):
  raise OSError(2, "No such file or directory", "/gone.txt")
patch.setattr(Text, "digest", gone)
""",
  "dumps": """
patch.setenv("XLA_FLAGS", "--xla_dump_to=/here " + os.environ.get("XLA_FLAGS", ""))
""",
  "clock": """
true = time.time
patch.setattr(time, "time", lambda: true() + 100)
""",
}
HOST = """
import contextlib, io, json, os, pathlib, socket, sys, time
from importlib import metadata
import pytest
from etils import epath
from bigtrain import cli, files, preflight
from bigtrain.config import FILE_MODULE
from bigtrain.data.text import Text
import tests.bigram
number = os.environ["BIGTRAIN_PROCESS"]
socket.gethostname = lambda: f"host-{number}"
files.VISIBLE = 0.5
told = {}
for name, particular in json.loads(sys.argv[2]).items():
  arguments = ["train", "tests/runs.py", "--steps", "2", "--quiet", "--dir"]
  arguments.append(f"{sys.argv[1]}/{name}")
  for module in [m for m in sys.modules if m.startswith(FILE_MODULE)]:
    del sys.modules[module]  # A process has one case.
  with pytest.MonkeyPatch.context() as patch:
    if number == "1":
      exec(particular)
    with contextlib.redirect_stderr(io.StringIO()) as said:
      code = cli.main(arguments)
  told[name] = code, said.getvalue()
with open(f"{sys.argv[1]}/{number}.json", "w") as file:
  json.dump(told, file)
"""

pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepared):
  return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def told(folder):
  """Of each case, the exit code and the messages of both processes."""
  shared = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "BIGTRAIN_COORDINATOR": f"127.0.0.1:{free_port()}",
    "BIGTRAIN_PROCESSES": "2",
  }
  both = [
    subprocess.Popen(
      [sys.executable, "-c", HOST, str(folder), json.dumps(PARTICULAR)],
      cwd=runs.ROOT,
      env=shared | {"BIGTRAIN_PROCESS": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in both:
    code, err = runs.finish(process)
    assert code == 0, err
  first, second = (json.loads((folder / f"{i}.json").read_text()) for i in range(2))
  return {name: (first[name], second[name]) for name in PARTICULAR}


@pytest.mark.parametrize(
  "case, message",
  [
    ("version", r"optax: [\d.]+ on host-0; 9.9 on host-1"),
    ("code", r"bigtrain's code: \w{8} on host-0; 00000007 on host-1"),
    ("file", r"the experiment's file: runs.py \w{8} on host-0; runs.py \w{8} on host-1"),
    ("module", r"module tests.bigram: bigram.py \w{8} on host-0; bigram.py \w{8} on host-1"),
    ("flags", r"XLA_FLAGS: .* on host-0; --new .* on host-1"),
    ("read_only", r"/read_only cannot be written: Read-only file system"),
    ("data", r"differ in data: data on host-1 \(process 1\), unlike the others"),
  ],
)
def test_all_processes_are_refused_and_told_which_host_it_is(folder, told, case, message):
  for code, said in told[case]:
    assert code == Exit.REFUSED and re.search(message, said), said
  assert not list((folder / case).glob("metrics.jsonl"))
  assert not list((folder / case).glob("preflight*"))


@pytest.mark.parametrize(
  "case, message",
  [
    ("folder", r"folder-elsewhere is not what the first process sees there"),
    ("stale", r"Stale file handle"),
  ],
)
def test_a_disk_that_may_be_well_again_fails_on_all_and_refuses_nothing(told, case, message):
  for code, said in told[case]:
    assert code == Exit.FAILED and re.search(message, said), said
  assert "the run directory, on host-1 (process 1): " in told[case][0][1]


def test_data_that_one_host_cannot_reach_fails_on_all_with_its_name(told):
  (first, other), (second, own) = told["no_data"]
  assert first == second == Exit.FAILED  # It may be there at the next start.
  assert "the data, on host-1 (process 1): " in other and "/gone.txt" in other
  assert "/gone.txt" in own


def test_what_only_one_process_has_loaded_is_no_difference(told):
  assert [code for code, _ in told["watched"]] == [Exit.DONE, Exit.DONE]


def test_dumps_may_go_elsewhere_on_each_host(told):
  assert [code for code, _ in told["dumps"]] == [Exit.DONE, Exit.DONE]


def test_clocks_that_differ_are_an_event_and_no_more(folder, told):
  assert [code for code, _ in told["clock"]] == [Exit.DONE, Exit.DONE]
  (event,) = runs.events(folder / "clock", "preflight")
  assert re.search(r"clock of host-1 \(process 1\) is (99|100)\.\d s ahead of", event["told"])


@pytest.mark.parametrize(
  "here, refused",
  [
    (["8 gpu", "8 gpu"], None),
    (["8 gpu", "1 gpu"], "launched to have 16 gpu devices.*8 gpu on host-0; 1 gpu on host-1"),
    (["1 gpu", "1 gpu"], "jax found: 1 gpu on host-0, host-1;.*JAX_LOCAL_DEVICE_IDS"),
    (["8 cpu", "8 cpu"], "jax found: 8 cpu on host-0, host-1;.*install jax for gpu"),
  ],
)
def test_other_devices_than_were_launched_are_refused_with_the_host(monkeypatch, here, refused):
  monkeypatch.setenv("BIGTRAIN_DEVICES", "gpu 16")
  told = [{"host": f"host-{i}", "facts": {"devices": each}} for i, each in enumerate(here)]
  monkeypatch.setattr(preflight, "gather", lambda own: [own | each for each in told])
  with pytest.raises(Refused, match=refused) if refused else contextlib.nullcontext():
    preflight.check_devices()
  preflight.check_devices(begun=True)  # A run that may go on with what is there.
  monkeypatch.setenv("BIGTRAIN_DEVICES", "16")
  with pytest.raises(Refused, match="'16'; give a platform and how many"):
    preflight.check_devices()


def test_a_single_process_without_the_chips_is_refused_before_it_compiles(tmp_path, capsys):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("BIGTRAIN_DEVICES", "gpu 8")
    code = cli.main(["train", "tests/runs.py", "--quiet", "--dir", str(tmp_path)])
  assert code == Exit.REFUSED and not list(tmp_path.iterdir())
  assert "launched to have 8 gpu devices" in capsys.readouterr().err


def test_a_launch_is_refused_after_so_many_starts_in_vain(tmp_path, monkeypatch):
  start = lambda: preflight.check(epath.Path(tmp_path))
  monkeypatch.setenv("BIGTRAIN_LAUNCH", "first 1")
  start()
  start()
  with pytest.raises(Refused, match=r"2 starts in a row went on from step 0.*--restarts 1"):
    start()
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  start()
  start()
  with pytest.raises(Refused, match="went on from step 5"):
    start()
  monkeypatch.setenv("BIGTRAIN_LAUNCH", "second 0")  # Launched again.
  start()
  with pytest.raises(Refused, match="1 starts in a row"):
    start()
  monkeypatch.delenv("BIGTRAIN_LAUNCH")
  start()
