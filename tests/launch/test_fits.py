"""The compiler is asked before machines are, and where it cannot be asked that is said."""

import importlib.util
import json
import subprocess

import pytest

from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.launch.fits import fits
from bigtrain.launch.job import Job
from bigtrain.launch.slurm import Slurm
from bigtrain.plan.topologies import GiB

STUDY = "experiments/quickstart.py"


def job(chips: str | None) -> Job:
  return Job(engine=Slurm(), chips=chips)


@pytest.fixture
def answers(monkeypatch):
  """Sets what the compiler's process answers."""

  def set_to(code: int, out: str = "", err: str = ""):
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

  return set_to


def test_a_step_that_fits_is_said_to(answers):
  answers(Exit.DONE, json.dumps({"memory": {"peak": 2 * GiB, "chip": 16 * GiB}}))
  assert "fits v5e:2x2: 2.0 of 16.0 GiB" in fits(STUDY, [], job("v5e:2x2"), smoke=False)


def test_a_step_that_does_not_fit_is_refused_with_what_to_ask(answers):
  answers(Exit.CHECK, json.dumps({"problem": "23G of 16G\nmore"}))
  with pytest.raises(Refused, match=r"23G of 16G; `.*plan .* --batch 9` says what would help"):
    fits(STUDY, ["--batch", "9"], job("v5e:2x2"), smoke=False)


@pytest.mark.parametrize(
  "chips, smoke, answer, why",
  [
    (None, False, (), "--chips names none"),
    ("v5e:2x2", True, (Exit.DONE, "{}"), "a run with --smoke is not planned"),
    ("v5e:2x2", False, (Exit.REFUSED, "", "bigtrain: no such\n"), "bigtrain: no such"),
  ],
)
def test_what_was_not_checked_is_said(answers, chips, smoke, answer, why):
  if answer:
    answers(*answer)
  assert fits(STUDY, [], job(chips), smoke=smoke).endswith(f"was not checked: {why}")


def test_no_compiler_is_no_refusal(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  assert "libtpu, which compiles for v5e:2x2, is not installed here" in fits(
    STUDY, [], job("v5e:2x2"), smoke=False
  )


@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_compiler_is_asked_for_real():
  assert "the step fits v5e:2x2: " in fits(STUDY, ["--batch", "16"], job("v5e:2x2"), smoke=False)
