import contextlib
import functools
import http.server
import os
import socket
import subprocess
import sys
import threading

import pytest

from bigtrain import processes
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit

LAUNCHERS = ("BIGTRAIN_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION")
STEP = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
TOGETHER = """
import pathlib, sys, time
from bigtrain import processes
processes.initialize()
processes.initialize()
import jax, numpy as np
from jax import P
with jax.set_mesh(jax.make_mesh((4,), ("x",))):
  x = np.arange(4.0, dtype=np.float32)
  summed = jax.shard_map(lambda x: jax.lax.psum(x, "x"), in_specs=P("x"), out_specs=P())
  sharded = jax.jit(lambda x: jax.sharding.reshard(x, P("x")))
  total = np.asarray(jax.jit(summed)(sharded(x)))
marker = pathlib.Path(sys.argv[1]) / "marker"
if not processes.is_first():
  time.sleep(0.5)
  marker.touch()
processes.agree(marker="written")
try:
  processes.agree(config="same", step=jax.process_index())
except processes.Refused as refused:
  assert "differ in step:" in str(refused)
else:
  raise AssertionError("different steps were taken for the same")
local = len(jax.local_devices())
said = f"{processes.is_first()} {local} {total[0]} {marker.exists()}"
(marker.parent / str(jax.process_index())).write_text(said)  # Gloo prints to stdout too.
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
  for name in list(os.environ):
    if name.startswith(LAUNCHERS):
      monkeypatch.delenv(name)
  monkeypatch.setattr(processes, "_tpu_attached", lambda: False)


def announce(monkeypatch, **variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)


@pytest.fixture
def joined(monkeypatch):
  """What each call of jax.distributed.initialize is given, in place of the call."""
  calls = []
  monkeypatch.setattr("jax.distributed.initialize", lambda **settings: calls.append(settings))
  return calls


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def started(code: str, *arguments: str, **variables: str):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"} | variables
  child = subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    yield child
  finally:
    child.kill()
    child.communicate()


def test_two_processes_sum_over_one_mesh_and_agree(tmp_path):
  common = {"BIGTRAIN_COORDINATOR": f"127.0.0.1:{free_port()}", "BIGTRAIN_PROCESSES": "2"}
  with contextlib.ExitStack() as stack:
    children = [
      stack.enter_context(started(TOGETHER, str(tmp_path), **common, BIGTRAIN_PROCESS=str(i)))
      for i in range(2)
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
  assert [child.returncode for child in children] == [0, 0], errors
  assert (tmp_path / "0").read_text() == "True 2 6.0 True"
  assert (tmp_path / "1").read_text() == "False 2 6.0 True"


@pytest.mark.parametrize("number", ["0", "1"])
def test_a_process_that_stays_alone_ends_by_the_deadline(number):
  address = f"127.0.0.1:{free_port()}"
  code = "import bigtrain.cli as c, bigtrain.processes as p; c.train = lambda _: p.initialize()\n"
  code += "raise SystemExit(c.main(['train']))"
  variables = {"BIGTRAIN_COORDINATOR": address, "BIGTRAIN_PROCESSES": "2", "BIGTRAIN_TIMEOUT": "1"}
  with started(code, BIGTRAIN_PROCESS=number, **variables) as child:
    _, error = child.communicate(timeout=60)
  assert child.returncode == Exit.DEADLINE, error
  assert "bigtrain: BIGTRAIN_COORDINATOR announces several processes" in error
  assert "within 1 s (BIGTRAIN_TIMEOUT)" in error and "Traceback" not in error


@pytest.mark.parametrize(
  "coordinator, count, number, message",
  [
    ("a:1", "2", "", "BIGTRAIN_PROCESS must be set too"),
    ("a:1", "", "", "BIGTRAIN_PROCESSES and BIGTRAIN_PROCESS must be set too"),
    ("", "2", "0", "BIGTRAIN_COORDINATOR must be set too"),
    ("", "", "0", "BIGTRAIN_COORDINATOR and BIGTRAIN_PROCESSES must be set too"),
    ("a:1", "2", "2", "number them from 0 to 1"),
    ("a:1", "two", "0", "BIGTRAIN_PROCESSES is 'two'; give a whole number from 1 on"),
    ("", "x", "", "BIGTRAIN_PROCESSES is 'x'; give a whole number"),
    ("a:1", "0", "0", "BIGTRAIN_PROCESSES is '0'"),
    ("a:1", "2", "-1", "BIGTRAIN_PROCESS is '-1'; give a whole number from 0 on"),
    ("a", "2", "0", "BIGTRAIN_COORDINATOR is 'a'; give host:port"),
    ("a:x", "2", "0", "give host:port"),
    (":1", "2", "0", "give host:port"),
    ("a:70000", "2", "0", "give host:port"),
  ],
)
def test_wrong_or_partial_settings_are_refused(
  monkeypatch, joined, coordinator, count, number, message
):
  said = dict(zip(processes.SETTINGS, (coordinator, count, number), strict=True))
  announce(monkeypatch, **said)
  with pytest.raises(Refused, match=message):
    processes.initialize()
  assert not joined


@pytest.mark.parametrize(
  "variables",
  [
    {"OMPI_COMM_WORLD_SIZE": "x"},
    STEP | {"SLURM_STEP_NUM_TASKS": "2(x3)"},
    {"MEGASCALE_NUM_SLICES": "two"},
  ],
)
def test_a_launcher_that_says_no_number_is_refused_by_its_variable(monkeypatch, joined, variables):
  announce(monkeypatch, **variables)
  with pytest.raises(Refused, match=f"{list(variables)[-1]} is '.*'; give a whole number from"):
    processes.initialize()
  assert not joined


def test_explicit_settings_overrule_the_launcher(monkeypatch, joined):
  said = dict(zip(processes.SETTINGS, ("[::1]:80", "3", "2"), strict=True))
  announce(monkeypatch, **STEP, **said, BIGTRAIN_TIMEOUT="7")
  processes.initialize()
  [settings] = joined
  assert settings.pop("initialization_timeout") > 7
  assert settings == {
    "coordinator_address": "[::1]:80",
    "num_processes": 3,
    "process_id": 2,
    "cluster_detection_method": "deactivate",
  }


@pytest.mark.parametrize(
  "variables, several",
  [
    ({}, False),
    (STEP, True),
    (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, False),  # A batch script, without srun.
    (STEP | {"BIGTRAIN_PROCESSES": "1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
  ],
)
def test_a_launcher_that_announces_several_processes_is_left_to_jax(
  monkeypatch, joined, variables, several
):
  announce(monkeypatch, **variables)
  processes.initialize()
  assert [set(settings) for settings in joined] == [{"initialization_timeout"}] * several


ON_SLURM = STEP | {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "localhost",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
  "variables, all_of_host",
  [
    (STEP | {"SLURM_STEP_NUM_NODES": "2"}, True),
    (STEP | {"SLURM_STEP_NUM_NODES": "1"}, False),  # A process for each device.
    (STEP | {"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "1,2"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
  ],
)
def test_a_process_that_has_its_host_to_itself_takes_all_devices(
  monkeypatch, joined, variables, all_of_host
):
  announce(monkeypatch, **variables)
  processes.initialize()
  [settings] = joined
  assert settings.pop("initialization_timeout")
  assert settings == ({"local_device_ids": []} if all_of_host else {})


@pytest.mark.parametrize(
  "variables, visible",
  [
    ({"SLURM_STEP_NUM_NODES": "2"}, "all"),
    ({"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"}, "3"),
    ({"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "1,2"}, "1,2"),
  ],
)
def test_jax_itself_sees_so_many_gpus_of_a_slurm_node(variables, visible):
  """What jax makes of what it is given. It reads another count, so that it waits for nobody."""
  code = """
from bigtrain import processes
processes.initialize()
import jax
print("visible:", jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
  alone = {"SLURM_NTASKS": "1", "JAX_COORDINATOR_PORT": str(free_port())}
  with started(code, **ON_SLURM | variables | alone) as child:
    out, error = child.communicate(timeout=60)
  assert f"visible: {visible}\n" in out, error


def test_a_tpu_slice_known_to_its_metadata_server_is_left_to_jax(monkeypatch, joined):
  hosts = []

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.path.endswith("/worker-network-endpoints") and hosts
      self.send_response(200 if known else 404)
      self.end_headers()
      self.wfile.write(",".join(hosts).encode())

    log_message = functools.partialmethod(lambda *_: None)

  monkeypatch.setattr(processes, "_tpu_attached", lambda: True)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    announce(monkeypatch, GCE_METADATA_IP=f"127.0.0.1:{server.server_port}", no_proxy="127.0.0.1")
    for here in ([], ["unknown:unknown:10.0.0.1"], ["10.0.0.1", "10.0.0.2"]):
      hosts[:] = here
      processes.initialize()
      assert len(joined) == (len(here) > 1)
    server.shutdown()


def test_what_jax_finds_wrong_is_told_with_the_remedy(monkeypatch):
  def fail(**_):
    raise ValueError("coordinator_address should be defined.\nmore")

  monkeypatch.setattr("jax.distributed.initialize", fail)
  announce(monkeypatch, **STEP)
  with pytest.raises(Refused) as refused:
    processes.initialize()
  message = str(refused.value)
  assert message.startswith("SLURM_STEP_NUM_TASKS announces several processes")
  assert "coordinator_address should be defined.;" in message and "more" not in message
  assert "BIGTRAIN_PROCESSES=1" in message
