"""What messages advise can be typed."""

import ast
import dataclasses
import pathlib
import re

import pytest

import bigtrain
from bigtrain import flags, hints
from bigtrain.config import Refused
from bigtrain.mesh import Mesh
from bigtrain.plan.search import pasted
from tests import toys

ROOT = pathlib.Path(bigtrain.__file__).parent


@pytest.mark.parametrize(
  "field, value",
  [
    ("steps", 7),
    ("epochs", None),
    ("mesh.ulysses", True),
    ("mesh.sequence", False),
    ("optimizer_on_host", False),
    ("new_weights", ("a", "b")),
    ("weights_from", "runs/a"),
  ],
)
def test_the_command_line_takes_what_is_advised(field, value):
  begun = dataclasses.replace(
    toys.experiment(), mesh=Mesh(sequence=True), optimizer_on_host=True, epochs=3
  )
  with hints.of_command():
    words = hints.to_set(field, value).split()
  assert words == pasted({field: value}).split()
  (made,) = flags.parse([begun], words, "bigtrain train", "")
  *path, name = field.split(".")
  for part in path:
    made = getattr(made, part)
  assert getattr(made, name) == value


def test_an_axis_that_is_not_there_is_answered_by_flags_that_there_are():
  with hints.of_command(), pytest.raises(Refused, match=r"or --mesh\.no_ulysses$"):
    Mesh(ulysses=True).shape(1)
  with pytest.raises(Refused, match=r"or experiment\.mesh\.ulysses = False$"):
    Mesh(ulysses=True).shape(1)


def test_flags_of_experiments_in_messages_are_spelt_by_hints():
  """In one place alone, so that each is one that the command line takes."""
  wrong = []
  for file in sorted(ROOT.rglob("*.py")):
    tree = ast.parse(file.read_text())
    told = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # Docstrings.
    for node in ast.walk(tree):
      if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
        found = re.findall(r"--(?:no_)?(?:mesh|model|data|optimizer|objective)\b\S*", node.value)
        wrong += [f"{file.relative_to(ROOT)}:{node.lineno}: {flag}" for flag in found]
  assert wrong == [EXAMPLE]


# What the help of parity says of its arguments; its reader has a command line.
EXAMPLE = "parity/command.py:36: --mesh.fsdp"


def test_fields_that_messages_advise_are_there():
  names = set()
  for file in ROOT.rglob("*.py"):
    names |= set(re.findall(r"""to_set\(f?["']([a-z_.]+)["']""", file.read_text()))
  leaves = set(flags._flags([toys.experiment()])[0])
  mesh, rest = {n for n in names if n.startswith("mesh.")}, {n for n in names if "." not in n}
  assert len(mesh) > 3 and rest and mesh | rest <= leaves
