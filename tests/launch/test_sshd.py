"""ssh for real: OpenSSH's own client and server, on two addresses of the loopback."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from bigtrain.exit_codes import Exit
from tests import runs
from tests.launch import stand_ins
from tests.test_processes import free_port

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("prepared"),
  pytest.mark.skipif(not os.path.exists(SSHD) or os.geteuid() != 0, reason="needs sshd, and root"),
]
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
AuthorizedKeysFile {folder}/own.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
  """The flags by which both are reached."""
  folder, port = tmp_path_factory.mktemp("sshd"), free_port()
  for name in ("host", "own"):
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
    subprocess.run(key, check=True)
  (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
  Path("/run/sshd").mkdir(exist_ok=True)
  server = subprocess.Popen([SSHD, "-D", "-f", folder / "config"])
  options = [f"Port={port}", f"IdentityFile={folder}/own", "StrictHostKeyChecking=no"]
  options.append(f"UserKnownHostsFile={folder}/known")
  try:
    yield ["--engine.machines", "root@127.0.0.1", "127.0.0.2", "--engine.options", *options]
  finally:
    server.kill()
    server.wait()


def test_a_process_that_is_killed_is_started_again_through_ssh(tmp_path, machines):
  def start(name: str) -> subprocess.Popen:
    port = ["--engine.port", str(free_port()), "--engine.pause", "0.1"]
    shared = [f"{name}={os.environ[name]}" for name in ("RUNS_TEXT", "BIGTRAIN_CACHE")]
    own = ["--environment", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1", *shared]
    train = ("--steps", "200", "--checkpoints.every", "40")
    return stand_ins.launch(
      tmp_path / name, "--to", "ssh", *machines, *port, *own, "--grace", "2", train=train
    )

  quiet = start("quiet")
  out, err = quiet.communicate(timeout=300)
  assert quiet.returncode == Exit.DONE, (out, err)
  killed = start("killed")
  runs.wait_until(killed, lambda: stand_ins.has_saved(tmp_path / "killed"))
  os.kill(stand_ins.process_of(tmp_path / "killed", 1), signal.SIGKILL)
  out, err = killed.communicate(timeout=300)
  assert killed.returncode == Exit.DONE and "restart 1 of" in err, (out, err)
  assert runs.events(tmp_path / "killed", "restore")
  assert runs.values(tmp_path / "killed") == runs.values(tmp_path / "quiet")
