"""Processes that cannot run together are told so at once, each of them, with the host's name."""

import json
import os
import re
import subprocess
import sys

import pytest

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
import contextlib, io, json, os, socket, sys, time
from importlib import metadata
import pytest
from etils import epath
from bigtrain import cli, preflight
from bigtrain.data.text import Text
number = os.environ["BIGTRAIN_PROCESS"]
socket.gethostname = lambda: f"host-{number}"
preflight.VISIBLE = 0.5
told = {}
for name, particular in json.loads(sys.argv[2]).items():
  arguments = ["train", "tests/runs.py", "--steps", "2", "--quiet", "--dir"]
  arguments.append(f"{sys.argv[1]}/{name}")
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


def test_dumps_may_go_elsewhere_on_each_host(told):
  assert [code for code, _ in told["dumps"]] == [Exit.DONE, Exit.DONE]


def test_clocks_that_differ_are_an_event_and_no_more(folder, told):
  assert [code for code, _ in told["clock"]] == [Exit.DONE, Exit.DONE]
  (event,) = runs.events(folder / "clock", "preflight")
  assert re.search(r"clock of host-1 \(process 1\) is (99|100)\.\d s ahead of", event["told"])
