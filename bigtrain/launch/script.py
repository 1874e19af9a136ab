"""The shell of a host. Every word that is no shell by intent (`setup`) goes through `quoted`."""

import shlex

from bigtrain.exit_codes import UNHELPED, Exit
from bigtrain.launch.job import Job

MISSING = (126, 127)  # As a shell says it of a command that is not there.
# After these codes no restart helps; all others are those of a run that can go on.
FINAL = (*map(int, UNHELPED), *MISSING)
NOT_FOUND = """\
command_not_found_handle() {
echo "bigtrain: this host has no command $1 on its PATH; --setup prepares a host, and --command\
 says how it calls bigtrain, as --command 'uv run bigtrain' or .venv/bin/bigtrain" >&2
return 127
}"""
LASTING = 600  # Seconds; a start that lasted longer failed at something else than starting.


def quoted(word: str) -> str:
  """A word of shell; a ~ in front of it keeps its meaning."""
  if word == "~" or word.startswith("~/"):
    return f"~/{shlex.quote(word[2:])}"
  return shlex.quote(word)


def exports(variables: dict[str, str]) -> list[str]:
  """A line for each variable."""
  return [f"export {name}={quoted(value)}" for name, value in variables.items()]


def prepared(job: Job) -> list[str]:
  """Lines that come before the command on every host."""
  moved = [] if job.folder is None else [f"cd {quoted(job.folder)} || exit {Exit.REFUSED}"]
  return [*NOT_FOUND.splitlines(), *exports(job.variables()), *moved, *job.setup.splitlines()]


def command(train: list[str]) -> str:
  """The command's line."""
  return shlex.join(train)


def numbered(coordinator: str, processes: int | str, process: str) -> list[str]:
  """Lines by which processes find each other where jax has no way of its own (processes.py).

  All three are shell: the host, how many, and which.
  """
  return [
    f"export BIGTRAIN_COORDINATOR={coordinator}",
    f"export BIGTRAIN_PROCESSES={processes}",
    f"export BIGTRAIN_PROCESS={process}",
  ]
