"""Configuration: the @config dataclass, and configs as JSON.

A config is a plain dataclass with keyword-only fields and slots, so that a misspelt field is an
error where it is written and editors know every name. Configs hash by value: a module keeps its own
config object as a static part of its pytree. A field holds a number, a string, a bool, None, a
config, or a tuple of these: what JSON and the command line can say.
"""

import copy
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")
FILE = "experiment.py"  # What a class of the experiment file, kept in the run directory, is under.
FILE_MODULE = "bigtrain_experiment_file_"  # How the module names of such files begin.


class Refused(Exception):
  """An input was refused before any work; exit code 2. The message names cause and remedy."""


class NoField(Refused, AttributeError):
  """A field was set that the config does not have."""


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
  """Makes `cls` a keyword-only, slotted, value-hashed dataclass.

  A default that holds a config is copied for every instance: changing a field of one experiment
  never changes another.

  Raises:
    TypeError: a base class without `__slots__` would let misspelt fields pass; or a public value of
      the class has no annotation, so that it would be no field.
  """
  for name, default in list(vars(cls).items()):
    plain = not (name.startswith("_") or callable(default) or hasattr(default, "__get__"))
    if plain and name not in inspect.get_annotations(cls):
      kind = type(default).__name__
      raise TypeError(
        f"{cls.__name__}.{name} has no type, so it is no field; write `{name}: {kind} = ...` for a "
        f"field, `{name}: ClassVar[{kind}] = ...` for a constant"
      )
    if any(True for _ in configs(default)):
      factory = lambda value=default: copy.deepcopy(value)
      setattr(cls, name, dataclasses.field(default_factory=factory))
  made = dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)(cls)
  if made.__dictoffset__:
    raise TypeError(f"{made.__name__}: every base class of a config needs `__slots__ = ()`")
  made.__setattr__ = _set
  return made


def _set(node: Any, name: str, value: Any) -> None:
  try:
    object.__setattr__(node, name, value)
  except AttributeError:
    near = nearest(name, [field.name for field in dataclasses.fields(node)])
    raise NoField(f"{type(node).__name__} has no field {name!r}{near}") from None


def at_least_0(node: Any, path: str) -> None:
  """Refuses a config, which stands at that path, any of whose numbers is negative."""
  for field in dataclasses.fields(node):
    if (value := getattr(node, field.name)) < 0:
      raise Refused(f"{join(path, field.name)} is {value}; it must be at least 0")


def is_config(value: object) -> bool:
  """Whether `value` is an instance of a config class."""
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def nearest(word: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` with the name closest to `word`, or the names there are."""
  known = sorted(known)
  if close := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
    return f"; did you mean {close[0]!r}?"
  return f"; there is {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}" if known else ""


def listed(names: Sequence[str], shown: int = 4) -> str:
  """The first few names, and how many more there are."""
  more = f" and {len(names) - shown} more" if len(names) > shown else ""
  return ", ".join(names[:shown]) + more


def configs(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Every config in `value`, itself included, with its dotted path; outer ones first."""
  if isinstance(value, tuple):
    for i, item in enumerate(value):
      yield from configs(item, join(path, i))
  elif is_config(value):
    yield path, value
    for field in dataclasses.fields(value):
      yield from configs(getattr(value, field.name), join(path, field.name))


def join(path: str, name: str | int) -> str:
  """The dotted path of a field of what lies at `path`."""
  return f"{path}.{name}" if path else str(name)


def dump(value: Any) -> Any:
  """A config as JSON: a dict of its fields, and its class as "module:name" under "class".

  Classes of the experiment file itself are under "experiment.py", its copy in the run directory.
  """
  if isinstance(value, tuple):
    return [dump(item) for item in value]
  if not is_config(value):
    return value
  fields = {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
  return {"class": _class_name(type(value))} | fields


def restore(tree: Any, file: types.ModuleType | None = None, path: str = "") -> Any:
  """The config that `dump` wrote. Fields that did not exist then take their default.

  Args:
    tree: what `dump` returned, or its JSON.
    file: the module of the experiment file, for the classes that it defines.
    path: where in the root `tree` stands, for messages.

  Raises:
    Refused: a class or a field that does not exist here, or a missing one without a default.
  """
  if isinstance(tree, list):
    return tuple(restore(item, file, join(path, i)) for i, item in enumerate(tree))
  if not isinstance(tree, dict):
    return tree
  at = path or "the experiment"
  if not isinstance(tree.get("class"), str):
    raise Refused(f'{at}: "class" is missing')
  cls = _find_class(tree["class"], file, at)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  values = {name: value for name, value in tree.items() if name != "class"}
  for name in values:
    if name not in fields:
      raise Refused(f"{at}: {cls.__name__} has no field {name!r}{nearest(name, fields)}")
  for field in fields.values():
    required = field.default is field.default_factory is dataclasses.MISSING
    if required and field.name not in values:
      raise Refused(f"{at}: the field {field.name!r} of {cls.__name__} is missing")
  return cls(**{k: restore(value, file, join(path, k)) for k, value in values.items()})


def diff(old: Any, new: Any) -> list[str]:
  """Each difference of two configs as `path: old -> new`."""
  return list(_differences(dump(old), dump(new), ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
  if isinstance(old, dict) and isinstance(new, dict) and old["class"] == new["class"]:
    for name in old:
      yield from _differences(old[name], new[name], join(path, name))
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    for i, pair in enumerate(zip(old, new, strict=True)):
      yield from _differences(*pair, join(path, i))
  elif old != new:
    yield f"{path}: {_brief(old)} -> {_brief(new)}"


def _brief(tree: Any) -> str:
  if isinstance(tree, list):
    return f"[{', '.join(map(_brief, tree))}]"
  return tree["class"].split(":")[-1] if isinstance(tree, dict) else shortened(tree)


def _class_name(cls: type) -> str:
  if "<locals>" in cls.__qualname__:
    raise Refused(f"{cls.__name__} is defined inside a function; move it to the top of its file")
  of_file = cls.__module__.startswith(FILE_MODULE)
  return f"{FILE if of_file else cls.__module__}:{cls.__qualname__}"


# Where classes of recorded configs went: every version restores what an earlier one saved.
MOVED = {"bigtrain.sharding:Mesh": "bigtrain.mesh:Mesh"}


def _find_class(name: str, file: types.ModuleType | None, at: str) -> type:
  module_name, _, qualname = MOVED.get(name, name).partition(":")
  try:
    if module_name == FILE:
      found: Any = file
    elif module_name.partition(".")[0] == __name__.partition(".")[0]:
      found = importlib.import_module(module_name)
    elif (found := sys.modules.get(module_name)) is None:
      # What a record names is not imported: that would run whatever lies on Python's path.
      raise Refused(
        f"{at}: the class {qualname!r} is in {module_name}, which is not loaded: import it before, "
        f"or in the experiment's file"
      )
    for part in qualname.split("."):
      found = vars(found)[part]
  except (ImportError, KeyError, TypeError, ValueError):
    where = Path(str(getattr(file, "__file__", FILE))).name if module_name == FILE else module_name
    raise Refused(f"{at}: there is no class {qualname!r} in {where}; was it moved?") from None
  if not isinstance(found, type) or vars(found).get("__setattr__") is not _set:
    raise Refused(f"{at}: {name} is not a config class")
  return found


def needs_file(text: str) -> bool:
  """Whether the JSON of a config names a class that bigtrain does not have."""
  return re.search(rf'"class": "(?!{__name__.partition(".")[0]}\.)', text) is not None


def shortened(value: Any) -> str:
  """What Python prints for a value, on one line of 60 characters at most."""
  if is_config(value):
    return f"{type(value).__name__}(...)"
  text = " ".join(repr(value).split())
  return text if len(text) <= 60 else f"{text[:57]}..."
