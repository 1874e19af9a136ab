"""Configuration: the @config dataclass. Loading, overriding and dumping live beside it.

A config is a plain dataclass with keyword-only fields and slots, so that a misspelt field is an
error where it is written and editors know every name. Configs hash by value: a module keeps its own
config object as a static part of its pytree.
"""

import dataclasses
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
  """Makes `cls` a keyword-only, slotted, value-hashed dataclass."""
  return dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)(cls)


class Refused(Exception):
  """An input was refused before any work. The message names the cause and the remedy; exit code 2."""
