"""`bigtrain launch EXPERIMENT --to ENGINE [fields of the job] [-- flags of train]`."""

import dataclasses
import os
import pathlib
import re
import secrets
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

from bigtrain import hints
from bigtrain.annotations import check_types
from bigtrain.cli import RunFlags, override, target
from bigtrain.config import Refused, config, nearest
from bigtrain.console import say
from bigtrain.exit_codes import Exit
from bigtrain.flags import names, parse
from bigtrain.launch.held import hold
from bigtrain.launch.job import LAUNCH, NAME, Job, Rendered
from bigtrain.launch.jobset import JobSet
from bigtrain.launch.remote import Gcloud, Held, Ssh
from bigtrain.launch.skypilot import SkyPilot
from bigtrain.launch.slurm import Slurm

if TYPE_CHECKING:
  from bigtrain.experiment import Experiment

ENGINES = {
  "slurm": Slurm,
  "jobset": JobSet,
  "skypilot": SkyPilot,
  "ssh": Ssh,
  "gcloud": Gcloud,
}
ABOUT = """Starts the experiment on other machines: --to slurm, jobset (GKE), skypilot, ssh or
gcloud (TPU VMs), or FILE.py:function that returns a bigtrain.launch.job.Job. What follows a bare --
are flags and overrides of `train`. The engine restarts the run; through ssh and gcloud this command
does, for as long as it runs."""
HIDDEN = "***"
# How a machine comes by the command that an engine is called by.
OBTAINED = {
  "sbatch": "launch where SLURM's own commands are, as on a login node",
  "kubectl": "see kubernetes.io/docs/tasks/tools",
  "sky": "uv tool install --with pip 'skypilot[gcp]', or of another cloud; see docs.skypilot.co",
  "ssh": "install OpenSSH's client",
  "gcloud": "see cloud.google.com/sdk/docs/install",
}


@config
class LaunchFlags:
  """How it is launched."""

  to: str = ""  # The engine, or the file and function of a job.
  out: str | None = None  # Folder for the rendered files and logs; launched/NAME unless given.
  dry_run: bool = False  # Print what would run, and run nothing.
  plan: bool = True  # Ask the chips' compiler first whether the step fits, where it is installed.


def command(arguments: list[str]) -> int | None:
  """bigtrain launch EXPERIMENT --to ENGINE."""
  own, of_train = _parted(arguments)
  name = target(own, "launch", "EXPERIMENT", "experiments/quickstart.py --to slurm")
  flags, job = _described(own if name is None else own[1:], name or "EXPERIMENT")
  if name is None:
    return Exit.DONE
  from bigtrain.load import load

  experiment, source = load(name)
  given, experiment = override(experiment, of_train, hints.command(f"launch {name} --"))
  if given.dir is not None:
    raise Refused("--dir is a field of the job: give it before the bare --")
  job = dataclasses.replace(job, dir=job.dir or source.run_dir(smoke=given.smoke))
  job = dataclasses.replace(job, name=job.name or _slug(str(job.dir)))
  check_types(job)
  job.check()
  _check_experiment(experiment, job)
  started = f"{LAUNCH}={secrets.token_hex(4)} {job.restarts}"
  job = dataclasses.replace(job, environment=(started, *job.environment))
  train = [*shlex.split(job.command), "train", name, "--dir", str(job.dir), *of_train]
  out = flags.out or f"launched/{job.name}"
  values = _values(job)
  if flags.dry_run:
    show(job.engine.render(job, train, out, dict.fromkeys(values, HIDDEN)))
    return Exit.DONE
  rendered = job.engine.render(job, train, out, values)
  _check_engine(rendered)
  if flags.plan:
    from bigtrain.launch.fits import fits

    say(fits(name, of_train, job, smoke=given.smoke))
  return _run(job, rendered)


def show(rendered: Rendered) -> None:
  """Prints files and commands as they would be."""
  for path, text in rendered.files.items():
    print(f"# {shlex.quote(path)}\n{text}")
  for each in (*rendered.checks, *rendered.commands):
    print(f"$ {shlex.join(each.argv)}")
    if each.stdin is not None:
      print(f"# which reads:\n{each.stdin.rstrip(chr(0))}")


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
  """What is before and after a bare --."""
  at = arguments.index("--") if "--" in arguments else len(arguments)
  return arguments[:at], arguments[at + 1 :]


def _described(arguments: list[str], name: str) -> tuple[LaunchFlags, Job]:
  """The flags and the job with what the arguments change of it."""
  prog = hints.command(f"launch {name}")
  chosen = _to(arguments)
  if chosen is None:
    if not {"-h", "--help"} & set(arguments):
      raise Refused(f"{prog} needs --to: {', '.join(ENGINES)}, or FILE.py:function of a job")
    parse([LaunchFlags()], ["--help"], prog, ABOUT)
  job = _job(str(chosen))
  try:
    flags, job = parse([LaunchFlags(), job], arguments, prog, ABOUT)
  except Refused as error:
    if not (found := _of_train(arguments, job, name)):
      raise
    raise Refused(
      f"--{found} is a flag of train: those come after a bare --, as in `{prog} --to {chosen} ... "
      f"-- --{found} ...`"
    ) from error
  return flags, job


def _of_train(arguments: list[str], job: Job, name: str) -> str | None:
  """The first flag that only `train` has."""
  from bigtrain.load import load

  experiment, _ = load(name)
  own, of_train = names([LaunchFlags(), job]), names([RunFlags(), experiment])
  for word in arguments:
    flag = word.removeprefix("--").partition("=")[0].replace("-", "_")
    leaf = re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", flag)  # As of --mesh.no_ulysses.
    if word.startswith("--") and leaf in of_train and leaf not in own:
      return flag
  return None


def _to(arguments: list[str]) -> str | None:
  """The value of --to, which decides what other flags there are."""
  for i, word in enumerate(arguments):
    if word.startswith("--to="):
      return word.removeprefix("--to=")
    if word == "--to" and i + 1 < len(arguments):
      return arguments[i + 1]
  return None


def _job(chosen: str) -> Job:
  if chosen in ENGINES:
    return Job(engine=ENGINES[chosen]())
  if ".py" not in chosen:
    raise Refused(f"--to {chosen}: there is no such engine{nearest(chosen, ENGINES)}")
  path = f"{chosen.rpartition('.py')[0]}.py"
  if not os.path.isfile(path):
    raise Refused(f"--to {chosen}: there is no file {path}, a function of which would return a Job")
  from bigtrain.load import load

  job, _ = load(chosen, Job)
  check_types(job)
  return job


def _slug(run_dir: str) -> str:
  """A name for a run directory, as engines take it."""
  last = re.sub(r"[^a-z0-9]+", "-", run_dir.rstrip("/").rpartition("/")[2].lower())
  found = re.sub(r"^[-0-9]+", "", last)[:40].strip("-")
  return found if re.fullmatch(NAME, found) else "bigtrain"


def _check_experiment(experiment: "Experiment", job: Job) -> None:
  """Refuses here what would be refused there."""
  from bigtrain.validate import validate

  there = job.topology()
  validate(experiment, None if there is None else there.chips, data=False)


def _values(job: Job) -> dict[str, str]:
  """Of the secrets, where the engine does not have them."""
  if job.engine.keeps_secrets:
    return {}
  if missing := [name for name in job.secrets if not os.environ.get(name)]:
    raise Refused(f"{missing[0]}, which --secrets names, is not set here")
  return {name: os.environ[name] for name in job.secrets}


def _check_engine(rendered: Rendered) -> None:
  """Refuses what the engine's commands would fail at each time, before a process begins."""
  for program in dict.fromkeys(each.argv[0] for each in rendered.commands):
    if shutil.which(program) is None:
      remedy = OBTAINED.get(program, "install it")
      raise Refused(f"there is no {program} here, which this engine is called by: {remedy}")
  for each in rendered.checks:
    done = subprocess.run(each.argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
      raise Refused(
        f"`{shlex.join(each.argv)}` ended with {done.returncode}: {done.stderr.strip()}"
      )


def _run(job: Job, rendered: Rendered) -> int:
  """Writes the files and runs the commands."""
  for path, text in rendered.files.items():
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
  if rendered.held:
    assert isinstance(job.engine, Held)
    engine = job.engine
    return hold(rendered.commands, restarts=job.restarts, grace=job.grace, pause=engine.pause)
  # An engine's commands say themselves what they did.
  failed = any([subprocess.run(each.argv).returncode for each in rendered.commands])
  return Exit.FAILED if failed else Exit.DONE
