"""`bigtrain data SUBCOMMAND ...`: what makes data ready for training."""

import importlib
from typing import NamedTuple

from bigtrain.config import Refused, nearest
from bigtrain.hints import command


class Subcommand(NamedTuple):
  """Where its function is, the line about it in the usage, and an example."""

  module: str
  function: str
  help: str
  example: str


SUBCOMMANDS = {
  "prepare": Subcommand(
    "bigtrain.data.prepare.command",
    "command",
    "clean, deduplicate, split and pack text files",
    command("data prepare experiments/data/austen.py --out prepared/austen", extra="data"),
  ),
  "fetch": Subcommand(
    "bigtrain.data.fetch",
    "command",
    "get a dataset by name, checked by its digest",
    command("data fetch fashion_mnist"),
  ),
}


def data(arguments: list[str]) -> int | None:
  """bigtrain data SUBCOMMAND ..."""
  name, *rest = arguments or ["--help"]
  if name in ("-h", "--help"):
    print("usage: bigtrain data SUBCOMMAND [arguments]\n")
    for name, found in SUBCOMMANDS.items():
      print(f"  {name:<8} {found.help}\n           {found.example}")
    return None
  if name not in SUBCOMMANDS:
    raise Refused(f"there is no command 'data {name}'{nearest(name, SUBCOMMANDS)}")
  found = SUBCOMMANDS[name]
  return getattr(importlib.import_module(found.module), found.function)(rest)
