"""Nested values as YAML that people can read: scripts stand in it as they are."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
  pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
  return dumper.represent_scalar(
    "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
  )


_Dumper.add_representer(str, _text)


def as_yaml(tree: Any) -> str:
  """The text of a tree of dicts, lists and scalars; what is None in a dict is left out."""
  return yaml.dump(_given(tree), Dumper=_Dumper, sort_keys=False, width=1000)


def _given(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {key: _given(value) for key, value in tree.items() if value is not None}
  return [_given(item) for item in tree] if isinstance(tree, list) else tree
