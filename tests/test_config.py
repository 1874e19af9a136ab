"""Configs: fields, types, JSON, differences, and loading experiment files."""

import dataclasses
import json
import subprocess
import sys
import textwrap
import types
from typing import ClassVar

import pytest

from bigtrain import load
from bigtrain.annotations import check_types
from bigtrain.config import Refused, config, diff, dump, restore
from bigtrain.experiment import Experiment
from tests import toys


def test_a_field_that_does_not_exist_cannot_be_set():
  with pytest.raises(AttributeError, match="layrs"):
    toys.Model().layrs = 3  # type: ignore
  with pytest.raises(Refused, match=r"^Experiment has no field 'batchh'; did you mean 'batch'"):
    toys.experiment().batchh = 3  # type: ignore


def test_a_base_without_slots_is_refused_since_it_would_accept_any_field():
  class Loose:
    pass

  with pytest.raises(TypeError, match="__slots__"):

    @config
    class Model(Loose):
      layers: int = 2


def test_a_default_config_is_not_shared_between_instances():
  one, other = toys.Model(), toys.Model()
  one.position.length = 3
  one.pattern[0].heads = 2
  assert other.position.length == 256 and other.pattern[0].heads == 4


def test_configs_with_equal_fields_are_equal_and_hash_alike():
  assert toys.Model(dim=8) == toys.Model(dim=8) != toys.Model(dim=9)
  assert hash(toys.Model(dim=8)) == hash(toys.Model(dim=8)) != hash(toys.Model(dim=9))


def wrong(path, value):
  e = toys.experiment()
  *parents, name = path.split(".")
  node = e
  for parent in parents:
    node = node[int(parent)] if parent.isdigit() else getattr(node, parent)
  setattr(node, name, value)
  return e


@pytest.mark.parametrize(
  ("path", "value", "expected"),
  [
    ("steps", "100", "steps must be int, not '100' (str)"),
    ("steps", 100.0, "steps must be int, not 100.0 (float)"),
    ("steps", True, "steps must be int, not True (bool)"),
    ("optimizer.lr", float("nan"), "optimizer.lr must be a finite number, not nan"),
    ("model.dropout", float("inf"), "model.dropout must be a finite number, not inf"),
    ("steps", float("nan"), "steps must be int, not nan (float)"),
    ("optimizer", toys.Sgd, "not the class Sgd; write Sgd(...)"),
    ("optimizer", toys.Data, "optimizer must be OptimizerConfig, not the class Data"),
    ("data.files", ["a", "b"], "not ['a', 'b'] (list); write ('a', 'b')"),
    ("data.files", "a.txt", "not 'a.txt' (str); write ('a.txt',)"),
    ("model.pattern", toys.Attention(), "not an Attention; write (Attention(...),)"),
    ("model.activation", "gelu", "model.activation must be 'relu' or 'silu', not 'gelu' (str)"),
    (
      "model.pattern.1.position",
      toys.Scaling(),
      "must be Rotary or Learned or None, not a Scaling",
    ),
    ("model.pattern", [toys.Attention()], "(list); write (Attention(...),)"),
    ("model.pattern", (toys.Attention(), 3), "model.pattern must be tuple[Attention, ...], not ("),
    ("batch_stages", ((1, 2), (3,)), "batch_stages must be tuple[tuple[int, int], ...]"),
    ("model", toys.Data(), "model must be ModelConfig, not a Data"),
    ("data.files", ("a", 3), "data.files must be tuple[str, ...]"),
    ("model.pattern.0.heads", None, "model.pattern.0.heads must be int, not None"),
  ],
)
def test_a_wrong_type_in_python_is_refused_with_its_path(path, value, expected):
  with pytest.raises(Refused) as refusal:
    check_types(wrong(path, value))
  assert expected in str(refusal.value)
  assert str(refusal.value).startswith(f"{path} must be ") and len(str(refusal.value)) < 150


def test_a_long_value_is_shortened_where_it_is_refused():
  with pytest.raises(Refused) as refusal:
    check_types(toys.experiment(steps=list(range(1000))))
  assert str(refusal.value).startswith("steps must be int, not [0, 1, 2, 3")
  assert str(refusal.value).endswith("... (list)") and len(str(refusal.value)) < 100


@pytest.mark.parametrize(
  ("path", "value"),
  [("optimizer.lr", 1), ("model.dropout", 0.5), ("model.dropout", None), ("model.position", None)],
)
def test_every_value_that_the_annotation_names_is_accepted(path, value):
  check_types(wrong(path, value))


def test_a_public_value_without_annotation_is_refused_since_it_would_be_no_field():
  with pytest.raises(TypeError, match=r"Own.heads has no type.*`heads: int = ...` for a field"):

    @config
    class Own(toys.Attention):
      heads = 8

  @config
  class Fine(toys.Model):
    LIMIT: ClassVar[int] = 3
    _table = (1, 2)
    kind = dict
    depth = property(lambda self: self.layers)

  assert Fine().depth == 2


def test_dump_survives_json_and_restores_the_equal_experiment():
  e = toys.experiment(batch_stages=((5, 64),), weights_from="runs/x")
  e.model.pattern[1].position.scaling = toys.Scaling(factor=3.0)
  again = restore(json.loads(json.dumps(dump(e))))
  assert again == e and type(again.model.pattern[1].position) is toys.Rotary


def test_only_configs_carry_a_class_in_the_dump():
  tree = dump(toys.experiment())
  assert tree["model"]["class"] == "tests.toys:Model" and tree["steps"] == 100
  assert tree["data"]["files"] == ["a.txt"] and tree["model"]["pattern"][0]["position"] is None


def test_a_field_added_later_takes_its_default_on_restore():
  tree = dump(toys.experiment(seed=3))
  del tree["seed"], tree["model"]["tied"]
  e = restore(tree)
  assert e.seed == 0 and e.model.tied is True


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    (
      lambda t: t["model"].update(layrs=3),
      "model: Model has no field 'layrs'; did you mean 'layers'",
    ),
    (lambda t: t["model"]["pattern"][1].update(x=3), "model.pattern.1: Attention has no field 'x'"),
    (lambda t: t.pop("batch"), "the field 'batch' of Experiment is missing"),
    (lambda t: t["model"].update({"class": "tests.toys:Modl"}), "no class 'Modl' in tests.toys"),
    (lambda t: t["model"].update({"class": "nowhere:X"}), "'X' is in nowhere, which is not"),
    (lambda t: t["model"].update({"class": "os:path.join"}), "not a config class"),
    (lambda t: t["model"].pop("class"), 'model: "class" is missing'),
  ],
)
def test_restore_refuses_what_it_does_not_know(change, expected):
  tree = dump(toys.experiment())
  change(tree)
  with pytest.raises(Refused) as refusal:
    restore(tree)
  assert expected in str(refusal.value)


def test_diff_names_each_changed_leaf_and_each_swapped_object():
  old, new = toys.experiment(), toys.experiment(steps=7)
  new.model.pattern[1].heads = 8
  new.model.position = toys.Rotary()
  new.data.files = ("a.txt", "b.txt")
  assert diff(old, new) == [
    "model.pattern.1.heads: 4 -> 8",
    "model.position: Learned -> Rotary",
    "data.files: ['a.txt'] -> ['a.txt', 'b.txt']",
    "steps: 100 -> 7",
  ]
  assert diff(old, toys.experiment()) == []


FILE = '''
"""Toy experiments."""
from bigtrain import Experiment
from bigtrain.config import config
from tests import toys
{extra}

@config
class Mine(toys.Model):
  own: int = 3

def base() -> Experiment:
  return toys.experiment(model=Mine(own=5))

def longer() -> Experiment:
  e = base()
  e.steps = 500
  return e
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  (tmp_path / "experiments").mkdir()

  def write(extra="", name="study.py"):
    path = tmp_path / "experiments" / name
    path.write_text(FILE.replace("{extra}", textwrap.dedent(extra)))
    return f"experiments/{name}"

  return write


def test_the_default_function_is_base_and_another_is_named_after_a_colon(write):
  path = write()
  e, source = load.load(path)
  assert e.steps == 100 and e.model.own == 5 and source.run_dir() == "runs/study"
  e, source = load.load(f"{path}:longer")
  assert e.steps == 500 and source.run_dir(smoke=True) == "runs/study-longer-smoke"


def test_siblings_are_imported_as_in_a_script_and_as_in_a_package(write):
  write(name="first_sibling.py")
  path = write(
    "from first_sibling import longer as a\nfrom experiments.first_sibling import longer as b"
  )
  assert load.load(f"{path}:a")[0].steps == load.load(f"{path}:b")[0].steps == 500


def test_functions_are_those_annotated_with_experiment(write):
  kinds = "Experiment[toys.Model, toys.Data, toys.Sgd, toys.Loss]"
  path = write(f"def helper(): ...\ndef a() -> {kinds}: ...\ndef b() -> '{kinds}': ...")
  assert set(load.functions(load.Path(path))) == {"base", "longer", "a", "b"}


def refusal(target):
  with pytest.raises(Refused) as refused:
    load.load(target)
  assert "\n" not in str(refused.value)
  return str(refused.value)


def test_a_wrong_file_or_function_is_answered_by_the_nearest(write):
  path = write()
  assert refusal("experiments/stdy.py") == (
    "there is no experiment file experiments/stdy.py; there is experiments/study.py"
  )
  assert "there is experiments/study.py" in refusal("study")
  assert "no run directory" in refusal("experiments")
  assert refusal(f"{path}:longr") == f"{path} has no function 'longr'; did you mean 'longer'?"


@pytest.mark.parametrize(
  ("body", "expected"),
  [
    ("e = base(); e.model.dimm = 3; return e", "Mine has no field 'dimm'; did you mean 'dim'?"),
    ("return base().optimiser", "Experiment has no field 'optimiser'; did you mean 'optimizer'?"),
    ("return Experiment(modle=3)", "Experiment has no field 'modle'; did you mean 'model'?"),
    ("return Mine(3)", "Mine takes its fields by name, as in Mine(field=value)"),
    ("return 1 / 0", "ZeroDivisionError: division by zero"),
    ("return Experiment(steps=1)", "Experiment also needs 'model', 'data', 'optimizer'"),
  ],
)
def test_an_error_in_the_file_is_one_line_with_its_place(write, body, expected):
  path = write(f"def broken():\n  {body}")
  assert refusal(f"{path}:broken").startswith(f"{path}:7: {expected}")


def test_what_is_no_python_is_refused_with_its_line(write):
  path = write("def broken(:")
  assert refusal(path).startswith(f"{path}:6: SyntaxError")
  assert "ModuleNotFoundError: No module named 'nowhere'" in refusal(write("import nowhere"))


def test_a_function_that_returns_something_else_is_refused(write):
  path = write("def three():\n  return 3")
  assert refusal(f"{path}:three") == f"{path}:6: three() returned int, not an Experiment"


def test_a_run_directory_holds_its_experiment_also_when_the_file_defined_the_class(write):
  e, source = load.load(f"{write()}:longer")
  load.write(e, "runs/a", source.file)
  (load.Path("experiments") / "study.py").unlink()
  again, source = load.load("runs/a")
  assert diff(e, again) == [] and again.model.own == 5 and again.steps == 500
  assert source.run_dir() == "runs/a"
  load.write(again, "runs/a", source.file)
  assert diff(e, load.load("runs/a")[0]) == []


def test_a_damaged_config_json_is_refused_with_its_place(write):
  load.write(toys.experiment(), "runs/a")
  path = load.Path("runs/a/config.json")
  path.write_text(path.read_text()[:-20])
  assert "config.json:" in refusal("runs/a") and "not JSON" in refusal("runs/a")
  for damage in (b"[" * 100_000, b'{"class": "\xff"}'):
    path.write_bytes(damage)
    assert "not JSON" in refusal("runs/a")


def test_importing_the_package_does_not_import_jax():
  code = "import bigtrain, bigtrain.cli, sys; assert 'jax' not in sys.modules, 'jax'"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_stay_what_they_are_after_their_room_is_imported():
  import bigtrain
  import bigtrain.experiment
  import bigtrain.sharding

  room = types.ModuleType("bigtrain.train")
  room.train = lambda: "trained"  # type: ignore
  package = type(bigtrain)("a_package_like_bigtrain")
  package.train = room  # What importing the room does.
  assert package.train() == "trained"
  assert bigtrain.Experiment is Experiment and bigtrain.Mesh is bigtrain.mesh.Mesh
  assert dataclasses.is_dataclass(bigtrain.Logging)
  with pytest.raises(AttributeError, match="trian"):
    bigtrain.trian  # noqa: B018
