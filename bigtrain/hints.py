"""Remedies as their reader would write them: flags to who runs a command, Python to who calls a
function."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_commanded = False


@contextlib.contextmanager
def of_command() -> Iterator[None]:
  """In here a command runs, so remedies are flags."""
  global _commanded
  before, _commanded = _commanded, True
  try:
    yield
  finally:
    _commanded = before


def either(flag: str, python: str) -> str:
  return f"--{flag}" if _commanded else python


def flag(field: str, value: Any) -> list[str]:
  """The words of the command line that set a field: `--steps 100`, or `--mesh.no_ulysses`."""
  if isinstance(value, bool):
    where, dot, name = field.rpartition(".")
    return [f"--{where}{dot}{'' if value else 'no_'}{name}"]
  return [f"--{field}", *map(str, value if isinstance(value, tuple) else (value,))]


def to_set(field: str, value: object) -> str:
  """`--steps 100`, or `experiment.steps = 100`."""
  return " ".join(flag(field, value)) if _commanded else f"experiment.{field} = {value}"


def command(arguments: str, extra: str = "") -> str:
  """`bigtrain ARGUMENTS` as it has to be typed: after `uv run`, bigtrain is not on the PATH.

  Args:
    arguments: what follows the program's name.
    extra: of the package, which uv would take away again.
  """
  if "UV" not in os.environ:  # uv sets it for what it runs.
    return f"bigtrain {arguments}"
  return f"uv run {f'--extra {extra} ' * bool(extra)}bigtrain {arguments}"


def installed(extra: str, python: str | None = None) -> str:
  """How an extra of the package is installed; `python` is the oldest version that it takes."""
  of = f"--python {python} " if python else ""
  needs = f" on Python {python} or later" if python else ""
  run = f"uv run {of}--extra {extra} bigtrain ..."
  return f"in a checkout {run}, or pip install '.[{extra}]'{needs}"
