"""A run goes on with other devices, on the nearest mesh, with the losses it would have had."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from bigtrain.config import Refused
from bigtrain.elastic import begun_on, fit
from bigtrain.exit_codes import Exit
from bigtrain.mesh import Mesh
from bigtrain.parts import Part
from bigtrain.train import train
from bigtrain.validate import check_mesh
from tests import runs, toys

pytestmark = pytest.mark.usefixtures("prepared")


def sizes(e, devices) -> dict[str, int]:
  return {axis: n for axis, n in e.mesh.shape(devices).items() if n > 1}


@pytest.mark.parametrize(
  "mesh, meant, here, microbatches, found, parts",
  [
    # Fewer shards of the parameters only where there is no other way.
    (Mesh(data=2, fsdp=4), 8, 4, 1, {"fsdp": 4}, 2),
    (Mesh(data=2, fsdp=4), 8, 2, 1, {"fsdp": 2}, 4),
    (Mesh(fsdp=-1), 8, 4, 2, {"fsdp": 4}, 4),
    (Mesh(fsdp=-1), 8, 1, 2, {}, 16),
    (Mesh(data=-1, fsdp=2), 8, 4, 1, {"data": 2, "fsdp": 2}, 2),
    # What is no power of two, where the batch is none.
    (Mesh(data=2, fsdp=4), 8, 6, 3, {"fsdp": 6}, 4),
    # Other axes stay.
    (Mesh(data=2, fsdp=2, tensor=2), 8, 4, 1, {"fsdp": 2, "tensor": 2}, 2),
    (Mesh(fsdp=2, tensor=4), 8, 4, 1, {"tensor": 4}, 2),
    # More devices than it began on.
    (Mesh(data=1, fsdp=4), 4, 8, 2, {"data": 2, "fsdp": 4}, 2),
    (Mesh(fsdp=-1), 4, 8, 2, {"data": 2, "fsdp": 4}, 2),
    (Mesh(slices=2, data=1, fsdp=4), 8, 4, 1, {"slices": 2, "fsdp": 2}, 2),
  ],
)
def test_the_nearest_mesh_holds_no_more_rows_at_once(mesh, meant, here, microbatches, found, parts):
  e = toys.experiment(
    mesh=mesh, microbatches=microbatches, batch=96, model=toys.Model(vocab=288, dim=96)
  )
  e.evaluation.batch = 96
  fitted = fit(e, here, meant)
  assert (sizes(fitted, here), fitted.microbatches) == (found, parts)
  assert fitted.batch == e.batch and e.mesh == mesh  # The one that was given is as it was.
  check_mesh(fitted, here)
  shards = lambda of, n: int(np.prod([k for a, k in sizes(of, n).items() if a != "tensor"]))
  rows = lambda of, n: of.batch / of.microbatches / shards(of, n)
  assert rows(fitted, here) <= rows(e, meant)


def test_slices_are_those_of_the_hardware():
  e = toys.experiment(mesh=Mesh(slices=4, fsdp=2), batch=32)
  assert sizes(fit(e, 4, 8, slices=2), 4) == {"slices": 2, "fsdp": 2}
  with pytest.raises(Refused, match="the 3 slices have no equal numbers of devices"):
    fit(e, 4, 8, slices=3)


@pytest.mark.parametrize(
  "mesh, batch, here, message",
  [
    (Mesh(fsdp=2, tensor=4), 32, 6, "tensor=4 take a multiple of 4; give it 4"),
    (Mesh(data=2, fsdp=4), 32, 7, "of which no mesh will do: .*7 shards of the batch"),
    (Mesh(data=8, fsdp=1), 8, 3, "3 shards of the batch and 3 microbatches or more do not divide"),
  ],
)
def test_what_cannot_be_is_refused_with_the_reason(mesh, batch, here, message):
  with pytest.raises(Refused, match=message):
    fit(toys.experiment(mesh=mesh, batch=batch), here, 8)


def test_every_stage_of_the_batch_is_divided():
  e = toys.experiment(mesh=Mesh(fsdp=8), batch=16, batch_stages=((50, 48),))
  assert fit(e, 4, 8).microbatches == 2
  with pytest.raises(Refused, match=r"6 shards .* 16, 48"):
    fit(e, 6, 8)


def test_a_run_is_meant_for_the_devices_of_its_first_start_or_of_its_mesh():
  events = [{"event": "start", "devices": n} for n in (8, 4)]
  assert begun_on(toys.experiment(), events) == 8
  assert begun_on(toys.experiment(mesh=Mesh(data=2, fsdp=8)), events) == 16
  assert begun_on(toys.experiment(), []) is None


# Real runs: 8 devices, then 4, then 8.


class Leave(Part):
  def __init__(self, at: int):
    self.at = at

  def before_step(self, step):
    if step == self.at:
      signal.raise_signal(signal.SIGTERM)


ON_FOUR = """
import sys
from tests import runs
from tests.test_elastic import Leave
from bigtrain.train import train
run = train(runs.base(), sys.argv[1], quiet=True, elastic=True, parts=[Leave(13)])
assert run.left and run.experiment.microbatches == 2, run
"""


def test_losses_are_those_of_an_undisturbed_run_with_half_of_the_devices_for_a_while(tmp_path):
  train(runs.base(), tmp_path / "whole", quiet=True)
  run_dir = tmp_path / "run"
  assert train(runs.base(), run_dir, quiet=True, elastic=True, parts=[Leave(6)]).left
  environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
  done = subprocess.run(
    [sys.executable, "-c", ON_FOUR, str(run_dir)],
    cwd=runs.ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  assert "4 devices instead of 8" in done.stderr
  run = train(runs.base(), run_dir, quiet=True, elastic=True)
  assert run.experiment.microbatches == 1 and run.state.step == 20
  starts = runs.events(run_dir, "start")
  assert [(e["devices"], e["mesh"], e["microbatches"]) for e in starts] == [
    (8, {"fsdp": 8}, 1),
    (4, {"fsdp": 4}, 2),
    (8, {"fsdp": 8}, 1),
  ]
  rows, expected = (runs.read(path, "metrics.jsonl") for path in (run_dir, tmp_path / "whole"))
  assert [(r["step"], r["kind"]) for r in rows] == [(r["step"], r["kind"]) for r in expected]
  for row, other in zip(rows, expected, strict=True):
    for name in row.keys() - {"kind", *runs.SPEED}:
      np.testing.assert_allclose(row[name], other[name], rtol=1e-5, err_msg=f"{name} {row}")


@pytest.mark.slow
def test_a_supervised_run_goes_on_with_what_is_there_and_one_without_is_refused(tmp_path):
  arguments = ("--mesh.fsdp", "4", "--mesh.data", "2")
  first = runs.start(tmp_path, *arguments, "--supervise", JAX_NUM_CPU_DEVICES="8")
  runs.wait_until(first, lambda: runs.lines(tmp_path / "metrics.jsonl") > 3)
  first.send_signal(signal.SIGTERM)
  code, err = runs.finish(first)
  assert code == Exit.LEFT, err
  code, err = runs.finish(runs.start(tmp_path, *arguments, JAX_NUM_CPU_DEVICES="4"))
  assert code == Exit.REFUSED and "mesh wants 8 devices" in err
  code, err = runs.finish(runs.start(tmp_path, *arguments, "--supervise", JAX_NUM_CPU_DEVICES="4"))
  assert code == Exit.DONE, err
  assert runs.events(tmp_path, "start")[-1]["mesh"] == {"fsdp": 4}
