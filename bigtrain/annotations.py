"""Whether the values in a config fit their annotations, and what to write where they do not."""

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints

from bigtrain.config import Refused, configs, is_config, join, shortened

UNIONS = (Union, types.UnionType)


def check_types(root: Any) -> None:
  """Refuses a field whose value its annotation does not allow, by its path."""
  for path, node in configs(root):
    try:
      kinds = hints(type(node))
    except NameError as error:
      raise Refused(f"{type(node).__name__}: an annotation cannot be resolved: {error}") from error
    for field in dataclasses.fields(node):
      value, kind = getattr(node, field.name), kinds[field.name]
      if isinstance(kind, TypeVar):
        kind = kind.__bound__
      if not fits(value, kind):
        raise Refused(f"{join(path, field.name)} {mismatch(value, kind)}")


def mismatch(value: Any, kind: Any) -> str:
  """What is wrong with a value that does not fit, and what to write where that is plain."""
  if isinstance(value, float) and not math.isfinite(value) and fits(0.0, kind):
    return f"must be a finite number, not {value}"
  if isinstance(value, type):
    shown, instead = f"the class {value.__name__}", f"{value.__name__}(...)"
    kinds = get_args(kind) if get_origin(kind) in UNIONS else (kind,)
    right = any(isinstance(k, type) and issubclass(value, k) for k in kinds)
  else:
    items = tuple(value) if isinstance(value, list) else (value,)
    shown, right = _shown(value), fits(items, kind)
    instead = f"({', '.join(map(shortened, items))}{',' * (len(items) == 1)})"
  return f"must be {said(kind)}, not {shown}" + f"; write {instead}" * right


def fits(value: Any, kind: Any) -> bool:
  """Whether the annotation `kind` allows `value`; an int may stand for a float."""
  origin, args = get_origin(kind), get_args(kind)
  if origin in UNIONS:
    return any(fits(value, arg) for arg in args)
  if origin is Literal:
    return any(value == arg and type(value) is type(arg) for arg in args)
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    every = (args[0],) * len(value) if args[-1:] == (...,) else args
    return len(value) == len(every) and all(map(fits, value, every))
  if kind is float:
    return type(value) in (int, float) and math.isfinite(value)
  if kind in (int, str, bool):
    return type(value) is kind
  return value is None if kind in (None, type(None)) else isinstance(value, kind)


def said(kind: Any) -> str:
  """An annotation in words."""
  if get_origin(kind) in UNIONS:
    return " or ".join(map(said, get_args(kind)))
  if get_origin(kind) is Literal:
    return " or ".join(map(repr, get_args(kind)))
  if get_origin(kind) is tuple:
    return f"tuple[{', '.join('...' if a is ... else said(a) for a in get_args(kind))}]"
  return "None" if kind in (None, type(None)) else getattr(kind, "__name__", str(kind))


def _shown(value: Any) -> str:
  if is_config(value):
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
  return f"{shortened(value)} ({type(value).__name__})"
