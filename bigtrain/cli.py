"""The bigtrain command: `bigtrain COMMAND ...` calls the one function that COMMAND names.

A command takes the arguments after its name and returns an exit code, or None for done. Nothing
here imports jax before a command needs it, so that help is quick.
"""

import atexit
import dataclasses
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bigtrain import hangs, supervise, watchdog
from bigtrain.annotations import check_types
from bigtrain.config import Refused, config, nearest
from bigtrain.deadlines import Deadlines
from bigtrain.exit_codes import Exit
from bigtrain.failures import explained, unraisable
from bigtrain.flags import parse
from bigtrain.hints import command as spelt
from bigtrain.hints import of_command
from bigtrain.secrets import excepthook, redacted
from bigtrain.supervise import Restarts
from bigtrain.tell import tell

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
  "plan": Command("bigtrain.plan.command", "command", "will it fit, and how fast: by the compiler"),
  "evaluate": Command("bigtrain.cli", "evaluate", "evaluate a run on its held-out split"),
  "diagnose": Command("bigtrain.cli", "diagnose", "what is wrong with a run, and what to do"),
  "report": Command("bigtrain.report.command", "command", "what runs recorded, as one HTML file"),
  "sample": Command("bigtrain.cli", "sample", "continue a prompt with a run's model"),
  "parity": Command("bigtrain.parity.command", "parity", "does a mesh compute what a device does"),
  "launch": Command(
    "bigtrain.launch.command", "command", "train on other machines: SLURM, GKE, ..."
  ),
  "data": Command("bigtrain.data.command", "data", "prepare text for training; fetch a dataset"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  own = argv is None  # Whether the process is this command's own.
  name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
  if own:
    # While a compiler runs for minutes no handler of Python's would get a turn, and a plan has
    # nothing to lose.
    handler = signal.SIG_DFL if name == "plan" else _stop
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, handler)
    sys.unraisablehook, sys.excepthook = unraisable, excepthook
    # The first handler to be registered is the last to be called: behind jax's, which meets the
    # other processes. What Python would then do to threads of libraries makes some of them abort.
    atexit.register(lambda: hangs.leave(code))
  code: int = Exit.FAILED
  try:
    with of_command():
      code = _run(name, arguments)
  except SystemExit as error:  # As of --help.
    code = error.code if isinstance(error.code, int) else Exit.FAILED if error.code else Exit.DONE
    raise
  except Exception:
    if not own:
      raise
    excepthook(*sys.exc_info())
  finally:
    if own:  # The exit code is known: a Ctrl-C while Python ends would give another.
      signal.signal(signal.SIGINT, signal.SIG_IGN)
    watchdog.over(code if own else None)
  return code


def _run(name: str, arguments: list[str]) -> int:
  """The exit code of a command; what is refused is said in one message."""
  try:
    if name in ("-h", "--help"):
      print(usage())
      return Exit.DONE
    if name not in COMMANDS:
      raise Refused(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    function = getattr(importlib.import_module(command.module), command.function)
    return function(arguments) or Exit.DONE
  except Exception as error:
    if (found := explained(error)) is None:
      raise
    if os.environ.get("BIGTRAIN_TRACEBACK") == "1":
      sys.excepthook(type(error), error, error.__traceback__)
    message, code = found
    print(f"bigtrain: {redacted(message)}", file=sys.stderr)
    return code


def _stop(number: int, frame) -> None:
  """Ends the process at once: a KeyboardInterrupt can get lost in callbacks of compiled libraries.

  Nothing is closed: that may take minutes, and what is on disk survives a kill at any moment.
  """
  tell("stopped at once; what was saved before is whole")
  watchdog.stop_at_once()
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
      f"example:    {spelt('train experiments/quickstart.py --steps 100')}",
      f"help:       {spelt('COMMAND --help')}",
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
  # Go on with a run whose config was another; supervised, no longer once it has made steps so.
  allow_changes: bool = False
  restart: bool = False  # Begin again at step 0 if none of the run's checkpoints is whole.
  profile: Profile = Profile()
  elastic: bool = False  # Go on with a run also on other devices than it began on.
  deadlines: Deadlines = Deadlines()
  supervise: bool = False  # Start it again when it fails, hangs or is killed; implies `elastic`.
  restarts: Restarts = Restarts()


# No field of an experiment may have these names: they are flags now or later.
RESERVED = (*(field.name for field in dataclasses.fields(RunFlags)), "help")


def train(arguments: list[str]) -> int | None:
  """bigtrain train EXPERIMENT [flags] [overrides]."""
  if "--supervise" in arguments and not {"--help", "-h"}.intersection(arguments):
    return supervise.command(arguments)
  line = supervise.tie()
  name = target(arguments, "train", "EXPERIMENT", "experiments/quickstart.py:base")
  if name is None:
    about = (
      "Trains path.py[:function] (base unless given), or goes on with a run directory. "
      f"`{spelt('train EXPERIMENT --help')}` also lists every field of that experiment."
    )
    parse([RunFlags()], arguments, spelt("train EXPERIMENT"), about)
    return Exit.DONE
  from bigtrain.load import load

  experiment, source = load(name)
  flags, experiment = override(experiment, arguments[1:], spelt(f"train {name}"))
  from bigtrain.validate import validate

  flags.deadlines.check()
  flags.deadlines.check_save(experiment.checkpoints.within)
  validate(experiment)
  run_dir = flags.dir or source.run_dir(smoke=flags.smoke)
  from bigtrain.parts import Profiler
  from bigtrain.train import train as train_experiment

  profile = flags.profile
  with watchdog.watch(flags.deadlines, run_dir, line):
    run = train_experiment(
      experiment,
      run_dir,
      source=source.file,
      quiet=flags.quiet,
      allow_changes=flags.allow_changes,
      restart=flags.restart,
      elastic=flags.elastic or line is not None,
      parts=[] if profile.start is None else [Profiler(profile.start, profile.steps)],
    )
  return Exit.LEFT if run.left else Exit.DONE


def override(
  experiment: "Experiment", arguments: list[str], prog: str
) -> "tuple[RunFlags, Experiment]":
  """The run flags and the experiment with its leaves overridden by command-line arguments.

  --smoke shrinks the experiment before that, so that an override means what it says.

  Raises:
    Refused: a field of the experiment holds a wrong type, or an argument is wrong.
    SystemExit: with code 0, after --help.
  """
  check_types(experiment)
  if "--smoke" in arguments:
    from bigtrain.smoke import shrink

    experiment = shrink(experiment)
  about = "Flags of the run and fields of the experiment."
  flags, experiment = parse([RunFlags(), experiment], arguments, prog, about)
  return flags, experiment


@config
class Evaluate:
  """Prints the metrics of a run's newest checkpoint on its held-out split."""


def evaluate(arguments: list[str]) -> None:
  """bigtrain evaluate RUN."""
  run_dir, _ = _run_arguments(Evaluate(), arguments, "runs/quickstart")
  from bigtrain.run import load_run

  for name, value in load_run(run_dir).evaluate().items():
    print(f"{name} {value:.6g}")


@config
class Diagnose:
  """Says what a run's records tell about its health, with the evidence and a remedy.

  The run may be one that is still going on. Troubles come first, then advice on saving time.
  """

  json: bool = False  # Print a list of objects: severity, kind, evidence, remedy.


def diagnose(arguments: list[str]) -> None:
  """bigtrain diagnose RUN."""
  run_dir, chosen = _run_arguments(Diagnose(), arguments, "runs/quickstart")
  from bigtrain import diagnose as room

  records = room.read(run_dir)
  findings = room.diagnose(records)
  if chosen.json:
    fields = ("severity", "kind", "evidence", "remedy")
    objects = [{name: getattr(finding, name) for name in fields} for finding in findings]
    print(json.dumps(objects, indent=2))
    return
  for finding in findings:
    print(f"{finding}\n")
  if not findings:
    print(f"nothing is wrong that {records.train['step'][-1]:.0f} steps would show")
  if not records.layers:
    print("layers were not looked at: the run records none (logging.layers_every), or not yet")


@config
class Sample:
  """Prints a prompt with its continuation by a run's newest checkpoint.

  The gaps that a model such as T5 fills are spelt "<extra_id_0>", "<extra_id_1>" and so on. Between
  several continuations stands a line of three dashes.
  """

  prompt: str = ""  # The text to continue, or to fill.
  tokens: int = 200  # Length of a continuation.
  temperature: float = 0.8  # 0 takes the likeliest token.
  top_k: int | None = None  # Only the k likeliest tokens.
  top_p: float | None = None  # Only the likeliest tokens that hold this probability together.
  seed: int = 0  # Another one gives other continuations.
  samples: int = 1  # How many continuations.


def sample(arguments: list[str]) -> None:
  """bigtrain sample RUN --prompt TEXT."""
  run_dir, chosen = _run_arguments(Sample(), arguments, "runs/quickstart --prompt 'It was'")
  from bigtrain.data.spans import joined
  from bigtrain.run import load_run

  settings = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
  texts = load_run(run_dir).sample(**settings)
  print("\n---\n".join(joined(chosen.prompt, text) for text in texts))


def _run_arguments(default: T, arguments: list[str], example: str) -> tuple[str, T]:
  """The run directory and the settings of a command about a run."""
  command = type(default).__name__.lower()
  run_dir = target(arguments, command, "RUN", example)
  if run_dir is not None and run_dir.partition(":")[0].endswith(".py"):
    from bigtrain.load import named

    raise Refused(f"bigtrain {command} takes a run, not its experiment: give {named(run_dir)}")
  about = inspect.getdoc(type(default)) or ""
  rest = arguments if run_dir is None else arguments[1:]
  [chosen] = parse([default], rest, spelt(f"{command} {run_dir or 'RUN'}"), about)
  return str(run_dir), chosen


def target(arguments: list[str], command: str, name: str, example: str) -> str | None:
  """What the command is about: its first argument. None if that asks for help."""
  first = arguments[0] if arguments else ""
  if first in ("-h", "--help"):
    return None
  if not first or first.startswith("-"):
    raise Refused(f"bigtrain {command} takes {name} first: {spelt(f'{command} {example}')}")
  return first


if __name__ == "__main__":
  sys.exit(main())
