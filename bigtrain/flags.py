"""Flags: the leaves of configs on the command line, through tyro.

tyro prints the help. What is wrong with an argument becomes one message, like any other refusal.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from bigtrain.annotations import UNIONS, said
from bigtrain.config import Refused, configs, join, shortened


def parse(defaults: Sequence[Any], arguments: list[str], prog: str, about: str) -> list[Any]:
  """The configs, with the leaves that `arguments` name changed.

  Raises:
    Refused: an argument is no flag of any of them, or its value is of a wrong type.
    SystemExit: with code 0, after --help.
  """
  import tyro

  unprefixed = tyro.conf.arg(name="")
  fields = [(f"config_{i}", Annotated[_kind(c), unprefixed]) for i, c in enumerate(defaults)]
  kind: Any = dataclasses.make_dataclass("Flags", fields)
  printed = io.StringIO()
  try:
    with contextlib.redirect_stderr(printed):
      parsed, unknown = tyro.cli(
        kind,
        default=kind(*defaults),
        args=arguments,
        prog=prog,
        description=about,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
      )
  except SystemExit as error:
    if not error.code:
      raise
    unknown = []
  else:
    if not unknown:
      return [getattr(parsed, name) for name, _ in fields]
  text = re.sub(r"[\s│╭╮╰╯─]", "", printed.getvalue())  # Its lines are broken anywhere.
  raise Refused(_explanation(defaults, arguments, unknown, text, prog))


def names(defaults: Sequence[Any]) -> list[str]:
  """The flags of these configs, without dashes."""
  return list(_flags(defaults)[0])


def _kind(node: Any) -> Any:
  """The class of a config; of a generic one what it may hold, of which tyro would warn."""
  kind: Any = type(node)
  parameters = getattr(kind, "__parameters__", ())
  return kind[tuple(p.__bound__ for p in parameters)] if parameters else kind


def _explanation(
  defaults: Sequence[Any], arguments: list[str], unknown: list[str], text: str, prog: str
) -> str:
  """What is wrong with the first argument that tyro did not know, or that its `text` names."""
  flags, objects = _flags(defaults)
  for name, values in _given(arguments):
    where, dot, last = name.rpartition(".")
    last = last.removeprefix("no_")
    yes, no = f"{where}{dot}{last}", f"{where}{dot}no_{last}"
    kind = flags.get(name, bool if flags.get(yes) is bool else None)
    if kind is bool and values:
      return f"--{name} takes no value: write --{yes} or --{no}"
    if kind is None and name not in ("help", "h"):
      word = f"--{name}" if name else values[0]
      return f"there is no flag {word}{_meant(name or word, list(flags), objects, prog)}"
    if f"--{name}" in text or set(values) & set(unknown):
      given = f"not {' '.join(values)!r}" if values else "and none is given"
      return f"--{name} must be {said(kind)}, {given}"
  return text


def _meant(name: str, flags: list[str], objects: dict[str, Any], prog: str) -> str:
  """What may be meant by a name that no flag has."""
  for path, held in objects.items():
    if name == path or (held is None and name.startswith(f"{path}.")):
      return (
        f": {path} is {shortened(held)}, and only the experiment file sets it, by e.{path} = ..."
      )
  flags = sorted(flags, key=lambda flag: flag.count("."))
  close = functools.partial(difflib.get_close_matches, name, n=1)
  # One letter is wrong; or the place of a name that is right; or more.
  same = [flag for flag in flags if flag.split(".")[-1] == name.split(".")[-1]]
  if near := close(flags, cutoff=0.85) or close(same) or same or close(flags):
    where = name.rpartition(".")[0]
    here = [flag.removeprefix(f"{where}.") for flag in flags if flag.startswith(f"{where}.")]
    elsewhere = bool(here) and not near[0].startswith(f"{where}.")
    return f"; did you mean --{near[0]}?" + f" {where} has {', '.join(here[:6])}" * elsewhere
  return f"; `{prog} --help` lists all"


def _flags(defaults: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """{flag: annotation} of the leaves, and {path: value} of the fields for configs."""
  flags, objects = {}, {}
  for path, node in (found for root in defaults for found in configs(root)):
    kinds = get_type_hints(type(node))
    for field in dataclasses.fields(node):
      value, at = getattr(node, field.name), join(path, field.name)
      if _is_leaf(kinds[field.name]):
        flags[at] = kinds[field.name]
      else:
        objects[at] = value
  return flags, objects


def _is_leaf(kind: Any) -> bool:
  """Whether a value of that annotation can be written on the command line."""
  args = [arg for arg in get_args(kind) if arg not in (..., type(None))]
  if get_origin(kind) in (*UNIONS, tuple):
    return all(map(_is_leaf, args))
  return get_origin(kind) is Literal or kind in (int, float, str, bool)


def _given(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
  """The flags in the arguments, without dashes, and the values after each."""
  name, values = "", []
  for word in [*arguments, "--"]:
    if re.match("--|-[a-zA-Z]", word):
      if name or values:
        yield name, values
      flag, equals, value = word.lstrip("-").partition("=")
      name, values = flag.replace("-", "_"), [value] * bool(equals)
    else:
      values.append(word)
