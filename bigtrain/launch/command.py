"""`bigtrain launch EXPERIMENT --to ENGINE [fields of the job] [-- flags of train]`."""

import dataclasses
import os
import pathlib
import re
import secrets
import shlex
import subprocess
from typing import TYPE_CHECKING

from bigtrain import hints
from bigtrain.annotations import check_types
from bigtrain.cli import override, target
from bigtrain.config import Refused, config, nearest
from bigtrain.console import say
from bigtrain.exit_codes import Exit
from bigtrain.flags import parse
from bigtrain.launch.held import hold
from bigtrain.launch.job import LAUNCH, NAME, Command, Job, Rendered
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


@config
class LaunchFlags:
  """How it is launched."""

  to: str = ""  # The engine, or the file and function of a job.
  out: str | None = None  # Folder for the rendered files and logs; launched/NAME unless given.
  dry_run: bool = False  # Print what would run, and run nothing.
  plan: bool = (
    True  # Ask the compiler first whether the step fits the chips, where it can be asked.
  )


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
  if flags.dry_run:
    show(job.engine.render(job, train, out, dict.fromkeys(job.secrets, HIDDEN)))
    return Exit.DONE
  values = _values(job)
  if flags.plan:
    from bigtrain.launch.fits import fits

    say(fits(name, of_train, job, smoke=given.smoke))
  return _run(job, job.engine.render(job, train, out, values))


def show(rendered: Rendered) -> None:
  """Prints files and commands as they would be."""
  for path, text in rendered.files.items():
    print(f"# {shlex.quote(path)}\n{text}")
  for each in rendered.commands:
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
  flags, job = parse([LaunchFlags(), job], arguments, prog, ABOUT)
  return flags, job


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
  if missing := [name for name in job.secrets if not os.environ.get(name)]:
    raise Refused(f"--secrets {missing[0]}: it is not set here")
  return {name: os.environ[name] for name in job.secrets}


def _run(job: Job, rendered: Rendered) -> int:
  """Writes the files and runs the commands."""
  for path, text in rendered.files.items():
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)
  if rendered.held:
    assert isinstance(job.engine, Held)
    engine = job.engine
    return hold(rendered.commands, restarts=job.restarts, grace=job.grace, pause=engine.pause)
  return max(map(_call, rendered.commands))


def _call(each: Command) -> int:
  """Runs a command of an engine, which says itself what it did."""
  try:
    code = subprocess.run(each.argv).returncode
  except FileNotFoundError:
    raise Refused(f"there is no {each.argv[0]} here, which this engine is called by") from None
  return Exit.FAILED if code else Exit.DONE
