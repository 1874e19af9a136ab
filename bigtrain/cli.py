"""The bigtrain command: `bigtrain COMMAND ...` calls the one function that COMMAND names.

A command takes the arguments after its name and returns an exit code, or None for done. Nothing
here imports jax before a command needs it, so that help is quick.
"""

import dataclasses
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

from bigtrain.config import Refused, check_types, config, nearest
from bigtrain.exit_codes import Exit

if TYPE_CHECKING:
  from bigtrain.experiment import Experiment


T = TypeVar("T")


class Command(NamedTuple):
  """Where a command's function is, and the line about it in the usage."""

  module: str
  function: str
  help: str


COMMANDS = {
  "train": Command("bigtrain.cli", "train", "train an experiment, or go on with a run"),
  "evaluate": Command("bigtrain.cli", "evaluate", "evaluate a run on its held-out split"),
  "sample": Command("bigtrain.cli", "sample", "continue a prompt with a run's model"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
  try:
    if name in ("-h", "--help"):
      print(usage())
      return Exit.DONE
    if name not in COMMANDS:
      raise Refused(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    function = getattr(importlib.import_module(command.module), command.function)
    return function(arguments) or Exit.DONE
  except (Refused, OSError) as error:  # The latter as by a full disk.
    if os.environ.get("BIGTRAIN_TRACEBACK") == "1":
      traceback.print_exception(error)
    print(f"bigtrain: {error}", file=sys.stderr)
    return Exit.REFUSED if isinstance(error, Refused) else Exit.FAILED
  except KeyboardInterrupt:
    goes_on = "; the same command goes on from what was saved" if name == "train" else ""
    print(f"bigtrain: stopped at once{goes_on}", file=sys.stderr, flush=True)
    # Nothing is closed: that may take minutes, and what is on disk survives a kill at any moment.
    os._exit(Exit.LEFT)


def usage() -> str:
  """What `bigtrain --help` prints."""
  return "\n".join(
    [
      "usage: bigtrain COMMAND [arguments]",
      "",
      "Trains large models in JAX: one code from a laptop to a pod.",
      "",
      *(f"  {name:<10} {command.help}" for name, command in COMMANDS.items()),
      "",
      "example:    bigtrain train experiments/quickstart.py --steps 100",
      "help:       bigtrain COMMAND --help",
      f"exit codes: {', '.join(f'{code.value} {code.name.lower()}' for code in Exit)}",
      "BIGTRAIN_TRACEBACK=1 shows the traceback of what was refused or failed.",
    ]
  )


@config
class Profile:
  """A trace of a few steps."""

  start: int | None = None  # The first step traced; None for no trace.
  steps: int = 3  # How many are traced.


@config
class RunFlags:
  """How a run is run: nothing here changes what it computes."""

  dir: str | None = None  # Run directory; runs/<file>[-<function>][-smoke] unless given.
  smoke: bool = False  # Shrink the experiment, to end within a minute on two CPU cores.
  quiet: bool = False  # No progress on the console.
  allow_changes: bool = False  # Go on with a run whose config was another.
  profile: Profile = Profile()


# No field of an experiment may have these names: they are flags now or later.
RESERVED = (*(field.name for field in dataclasses.fields(RunFlags)), "supervise", "help")


def train(arguments: list[str]) -> int | None:
  """bigtrain train EXPERIMENT [flags] [overrides]."""
  target = _target(arguments, "train", "EXPERIMENT", "experiments/quickstart.py:base")
  if target is None:
    about = (
      "Trains path.py[:function] (base unless given), or goes on with a run directory. "
      "`bigtrain train EXPERIMENT --help` also lists every field of that experiment."
    )
    _parse(RunFlags, RunFlags(), arguments, "bigtrain train EXPERIMENT", about)
    return Exit.DONE
  # Until there is something to save, a polite kill is what Ctrl-C is.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  from bigtrain.load import load

  experiment, source = load(target)
  flags, experiment = override(experiment, arguments[1:], f"bigtrain train {target}")
  from bigtrain.validate import validate

  validate(experiment)
  run_dir = flags.dir or source.run_dir(smoke=flags.smoke)
  from bigtrain.train import train as train_experiment

  run = train_experiment(
    experiment,
    run_dir,
    source=source.file,
    quiet=flags.quiet,
    allow_changes=flags.allow_changes,
    profile=flags.profile,
  )
  return Exit.LEFT if run.left else Exit.DONE


def override(
  experiment: "Experiment", arguments: list[str], prog: str
) -> "tuple[RunFlags, Experiment]":
  """The run flags and the experiment with its leaves overridden by command-line arguments.

  --smoke shrinks the experiment before that, so that an override means what it says.

  Raises:
    Refused: a field of the experiment holds a wrong type.
    SystemExit: with code 2 after one message about the arguments, or 0 after --help.
  """
  from bigtrain.experiment import Experiment

  check_types(experiment)
  if "--smoke" in arguments:
    from bigtrain.smoke import shrink

    experiment = shrink(experiment)
  import tyro

  unprefixed = tyro.conf.arg(name="")
  fields = (("flags", RunFlags), ("experiment", Experiment))
  both = dataclasses.make_dataclass("Train", [(n, Annotated[t, unprefixed]) for n, t in fields])
  default = both(RunFlags(), experiment)
  parsed = _parse(both, default, arguments, prog, "Flags of the run and fields of the experiment.")
  return parsed.flags, parsed.experiment


@config
class Evaluate:
  """Prints the metrics of a run's newest checkpoint on its held-out split."""


def evaluate(arguments: list[str]) -> None:
  """bigtrain evaluate RUN."""
  run_dir, _ = _run_arguments(Evaluate(), arguments, "runs/quickstart")
  from bigtrain.train import load_run

  for name, value in load_run(run_dir).evaluate().items():
    print(f"{name} {value:.6g}")


@config
class Sample:
  """Prints continuations of a prompt by a run's newest checkpoint."""

  prompt: str = ""  # The text to continue.
  tokens: int = 200  # Length of a continuation.
  temperature: float = 0.8  # 0 takes the likeliest token.
  top_k: int | None = None  # Only the k likeliest tokens.
  top_p: float | None = None  # Only the likeliest tokens that hold this probability together.
  seed: int = 0
  samples: int = 1  # Continuations.


def sample(arguments: list[str]) -> None:
  """bigtrain sample RUN --prompt TEXT."""
  run_dir, chosen = _run_arguments(Sample(), arguments, "runs/quickstart --prompt 'It was'")
  from bigtrain.train import load_run

  settings = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
  for text in load_run(run_dir).sample(**settings):
    print(text)


def _run_arguments(default: T, arguments: list[str], example: str) -> tuple[str, T]:
  """The run directory and the settings of a command about a run."""
  command = type(default).__name__.lower()
  run_dir = _target(arguments, command, "RUN", example)
  about = type(default).__doc__ or ""
  rest = arguments if run_dir is None else arguments[1:]
  chosen = _parse(type(default), default, rest, f"bigtrain {command} {run_dir or 'RUN'}", about)
  return str(run_dir), chosen


def _target(arguments: list[str], command: str, name: str, example: str) -> str | None:
  """What the command is about: its first argument. None if that asks for help."""
  first = arguments[0] if arguments else ""
  if first in ("-h", "--help"):
    return None
  if not first or first.startswith("-"):
    raise Refused(f"bigtrain {command} takes {name} first: bigtrain {command} {example}")
  return first


def _parse(kind: type, default, arguments: list[str], prog: str, about: str):
  import tyro

  return tyro.cli(
    kind,
    default=default,
    args=arguments,
    prog=prog,
    description=about,
    config=(tyro.conf.AvoidSubcommands,),
    use_underscores=True,
  )


if __name__ == "__main__":
  sys.exit(main())
