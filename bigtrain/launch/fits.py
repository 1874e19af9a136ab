"""Whether the step fits the chips, asked of their compiler before any machine is."""

import importlib.util
import json
import shlex
import subprocess
import sys

from bigtrain import hints
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.launch.job import Job
from bigtrain.plan.topologies import COMPILERS, GiB

LONGEST = 1800  # Seconds; the largest presets took minutes (docs/plan.md).


def fits(experiment: str, overrides: list[str], job: Job, *, smoke: bool) -> str:
  """What the compiler says, or why it was not asked.

  Raises:
    Refused: the step takes more memory than the chips have.
  """
  not_checked = "whether the step fits was not checked: "
  if (there := job.topology()) is None:
    return f"{not_checked}--chips names none"
  package, _ = COMPILERS[there.chip.platform]
  if importlib.util.find_spec(package) is None:
    return f"{not_checked}{package}, which compiles for {job.chips}, is not installed here"
  if smoke:
    return f"{not_checked}a run with --smoke is not planned"
  plan = ["plan", experiment, "--topology", str(job.chips), "--slices", str(job.slices), "--json"]
  words = [sys.executable, "-m", "bigtrain.cli", *plan, *overrides]
  try:
    done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST)
  except subprocess.TimeoutExpired:
    return f"{not_checked}the compiler took more than {LONGEST} s"
  if done.returncode not in (Exit.DONE, Exit.CHECK):
    return f"{not_checked}{_last(done.stderr)}"
  found = json.loads(done.stdout)
  if done.returncode == Exit.CHECK:
    again = hints.command(shlex.join([*plan[:-1], *overrides]))
    raise Refused(
      f"the step does not fit {job.chips}: {found['problem'].splitlines()[0]}; `{again}` says what "
      "would help, and --no_plan launches it all the same"
    )
  memory = found["memory"]
  peak, chip = memory["peak"] / GiB, memory["chip"] / GiB
  return f"the step fits {job.chips}: {peak:.1f} of {chip:.1f} GiB, by its compiler"


def _last(text: str) -> str:
  return (text.strip().splitlines() or ["nothing was said"])[-1]
