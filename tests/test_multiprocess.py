"""Several processes are one run: the same losses, one record, checkpoints that either can read.

The mesh has one axis here; those of several are compared in tests/test_parity.py.
"""

import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from bigtrain.exit_codes import Exit
from bigtrain.parts import Part
from bigtrain.train import train
from tests import runs

BYTES = """
import hashlib, jax, numpy as np
from bigtrain import Mesh, processes, sharding
from bigtrain.data.feed import put
from tests import runs
processes.initialize()
data = runs.base().data.make(0)
with jax.set_mesh(Mesh(data=1, fsdp=1, tensor=8).make()):
  batch = put(lambda rows: data.batch(5, 8, rows), 8, sharding.batch_sharding())
digest = hashlib.sha256()
for name in sorted(batch):
  for shard in batch[name].addressable_shards:
    assert shard.data.shape == (8, 64)
    digest.update(np.asarray(shard.data).tobytes())
print(jax.process_count(), digest.hexdigest())
"""


pytestmark = pytest.mark.usefixtures("prepared")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The rows of one process with eight devices."""
  run = train(runs.base(), tmp_path_factory.mktemp("alone") / "run", quiet=True)
  return runs.read(run.directory.path, "metrics.jsonl")


def start(run_dir, processes: int) -> list:
  return [runs.start(run_dir, **each) for each in runs.joined(processes)]


def compare(run_dir, expected) -> None:
  """Every value of every row, to rounding: the processes' sums are not added in one order."""
  rows = runs.read(run_dir, "metrics.jsonl")
  assert [(r["step"], r["kind"]) for r in rows] == [(r["step"], r["kind"]) for r in expected]
  for row, other in zip(rows, expected, strict=True):
    names = row.keys() - {"kind", *runs.SPEED}
    assert names == other.keys() - {"kind", *runs.SPEED}
    for name in names:
      np.testing.assert_allclose(row[name], other[name], rtol=1e-6, err_msg=f"{name} {row}")


def test_sigterm_to_one_of_two_processes_saves_what_one_process_goes_on_from(tmp_path, alone):
  both = start(tmp_path, 2)
  runs.wait_until(both[0], lambda: runs.lines(tmp_path / "metrics.jsonl") > 2)
  both[1].send_signal(signal.SIGTERM)
  for process in both:
    code, err = runs.finish(process)
    assert code == Exit.LEFT, err
  saved = runs.saved(tmp_path)[-1]
  assert runs.keys(tmp_path)[-1][0] == saved < 20
  (signalled,) = runs.events(tmp_path, "signal")
  assert signalled["step"] == saved
  assert [e["processes"] for e in runs.events(tmp_path, "start")] == [2]  # One record, not two.
  run = train(runs.base(), tmp_path, quiet=True)
  assert run.state.step == 20
  compare(tmp_path, alone)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_go_on_from_what_one_saved(tmp_path, alone, count):
  class Leave(Part):
    def before_step(self, step):
      if step == 6:
        signal.raise_signal(signal.SIGTERM)

  assert train(runs.base(), tmp_path, quiet=True, parts=[Leave()]).left
  for process in start(tmp_path, count):
    code, err = runs.finish(process)
    assert code == Exit.DONE, err
  assert [e["processes"] for e in runs.events(tmp_path, "start")] == [1, count]
  assert runs.saved(tmp_path) == [15, 20]
  compare(tmp_path, alone)


def test_a_tensor_axis_over_two_processes_reads_the_same_bytes():
  def digests(environments):
    command = [sys.executable, "-c", BYTES]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    each = [
      subprocess.Popen(command, cwd=runs.ROOT, env=env | e, stdout=subprocess.PIPE, text=True)
      for e in environments
    ]
    return [process.communicate(timeout=300)[0].split() for process in each]

  (count, digest), other = digests(runs.joined(2))
  data = runs.base().data.make(0).batch(5, 8)
  expected = hashlib.sha256()
  for name in sorted(data):
    expected.update(data[name].tobytes() * 4)  # Each of a process's four devices has all rows.
  assert count == "2" and digest == expected.hexdigest() and other == [count, digest]
