"""Loading experiments: from `path.py:function`, or from the config.json of a run directory.

What goes wrong inside an experiment file becomes one message with its place in that file.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_origin

from etils import epath

from bigtrain import config, files
from bigtrain.config import Refused, nearest
from bigtrain.experiment import Experiment

DEFAULT_FUNCTION = "base"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where an experiment was loaded from."""

  file: Path | None  # The experiment file, or its copy in the run directory if there is one.
  function: str = ""  # Its function; none if the experiment was read from a run directory.
  read_from: str | None = None  # That run directory.

  def run_dir(self, smoke: bool = False) -> str:
    """The run directory when none is named: runs/<file>[-<function>][-smoke]."""
    if self.read_from is not None or self.file is None:
      return str(self.read_from)
    function = "" if self.function == DEFAULT_FUNCTION else f"-{self.function}"
    return str(Path("runs") / f"{self.file.stem}{function}{'-smoke' if smoke else ''}")


def load(target: str, kind: type[T] = Experiment) -> tuple[T, Source]:
  """The experiment that `target` names: `path.py`, `path.py:function` or a run directory.

  Args:
    target: what names it.
    kind: what it has to be, where that is another config.

  Raises:
    Refused: there is no such file or function, or it fails, or it returns something else.
  """
  path, function = _split(target)
  if path.suffix == ".py" and path.is_file():
    return _call(path, function or DEFAULT_FUNCTION, kind), Source(
      path, function or DEFAULT_FUNCTION
    )
  if function is None and (epath.Path(target) / "config.json").exists():
    experiment, file = read(target, kind)
    return experiment, Source(file, read_from=target)
  if path.is_dir():
    raise Refused(f"{target} is no run directory: it has no config.json{_near_files(path)}")
  if path.is_file():
    raise Refused(f"{path} is no .py file, as experiments are{_near_files(path)}")
  if not path.suffix:
    raise Refused(f"there is no run directory {target}{near_runs(target)}{_near_files(path)}")
  raise Refused(f"there is no experiment file {path}{_near_files(path)}")


def named(target: str) -> str:
  """The run directory of an experiment file, unless another is given."""
  path, function = _split(target)
  return Source(path, function or DEFAULT_FUNCTION).run_dir()


def near_runs(target: str) -> str:
  """The runs that have begun to train, beside a directory that is not there."""
  runs = [str(file.parent) for file in Path(target).parent.glob("*/metrics.jsonl")]
  return nearest(target, runs)


def near_weights(target: str, suffix: str) -> str:
  """The runs with checkpoints, or the files with that suffix, beside what is not there."""
  folder = Path(target).parent
  if target.endswith(suffix):
    return nearest(target, map(str, folder.glob(f"*{suffix}")))
  saved = {str(step.parent.parent) for step in folder.glob("*/checkpoints/[0-9]*")}
  return nearest(target, saved)


def functions(path: Path) -> dict[str, Callable[[], Experiment]]:
  """The public functions of an experiment file that return an Experiment, by name."""
  public = {name: f for name, f in vars(_module(path)).items() if name[0] != "_"}
  found = {name: f for name, f in public.items() if inspect.isfunction(f)}
  kinds = (str(Experiment), "Experiment", "bigtrain.Experiment")  # Or Experiment[...].
  returned = {name: f.__annotations__.get("return") for name, f in found.items()}
  plain = {name: str(get_origin(kind) or kind).partition("[")[0] for name, kind in returned.items()}
  return {name: f for name, f in found.items() if plain[name] in kinds}


def write(experiment: Any, run_dir: str | os.PathLike, file: Path | None = None) -> None:
  """Writes config.json, and the experiment file as experiment.py beside it; whole or not at all."""
  run_dir = epath.Path(run_dir)
  run_dir.mkdir(parents=True, exist_ok=True)
  texts = {"config.json": json.dumps(config.dump(experiment), indent=2) + "\n"}
  if file is not None and not _same_file(file, run_dir / config.FILE):
    texts = {config.FILE: file.read_text(encoding="utf-8")} | texts
  for name, text in texts.items():
    files.replace(run_dir / name, text)


def read(run_dir: str | os.PathLike, kind: type[T] = Experiment) -> tuple[T, Path | None]:
  """The experiment of a run directory, and its copy of the experiment file if it has one."""
  path = epath.Path(run_dir) / "config.json"
  if not path.exists():
    if not epath.Path(run_dir).exists():
      raise Refused(f"there is no run directory {run_dir}{near_runs(os.fspath(run_dir))}")
    raise Refused(f"{run_dir} is no run directory: it has no config.json")
  try:
    text = path.read_text(encoding="utf-8")
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    raise Refused(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
  except (ValueError, RecursionError) as error:
    raise Refused(f"{path} is not JSON: {error}") from error
  file = _local(epath.Path(run_dir) / config.FILE)
  module = _module(file) if file is not None and config.needs_file(text) else None
  try:
    experiment = config.restore(tree, module)
  except Refused as error:
    raise Refused(f"{path}: {error}") from error
  if not isinstance(experiment, kind):
    raise Refused(f"{path} holds no {kind.__name__}")
  return experiment, file


def _local(path: epath.Path) -> Path | None:
  """The file itself if it is on this machine, else a copy of it; None if there is none."""
  if not path.exists():
    return None
  if "://" not in str(path):
    return Path(os.fspath(path))
  copy = Path(tempfile.mkdtemp()) / path.name
  copy.write_text(path.read_text(), encoding="utf-8")
  return copy


def _split(target: str) -> tuple[Path, str | None]:
  path, colon, function = target.rpartition(":")
  return (Path(path), function) if colon and path.endswith(".py") else (Path(target), None)


def _call(path: Path, name: str, kind: type[T]) -> T:
  module = _module(path)
  function = getattr(module, name, None)
  if not inspect.isfunction(function):
    known = [n for n, f in vars(module).items() if inspect.isfunction(f) and n[0] != "_"]
    raise Refused(f"{path} has no function {name!r}{nearest(name, known)}")
  experiment = _explained(path, function)
  if not isinstance(experiment, kind):
    line = inspect.getsourcelines(function)[1]
    wanted = f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
    raise Refused(f"{path}:{line}: {name}() returned {type(experiment).__name__}, not {wanted}")
  return experiment


def _module(path: Path) -> ModuleType:
  """The experiment file as a module under a name of its own; its siblings can be imported."""
  path = path.resolve()
  name = f"{config.FILE_MODULE}{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
  # `import sibling` works as in a script, `from experiments.sibling import ...` as in a package.
  for place, at in ((str(path.parent), 0), (str(path.parent.parent), len(sys.path) + 1)):
    if place not in sys.path:
      sys.path.insert(at, place)
  module_spec = importlib.util.spec_from_file_location(name, path)
  assert module_spec is not None and module_spec.loader is not None
  module = importlib.util.module_from_spec(module_spec)
  sys.modules[name] = module  # Where annotations of its classes are looked up.
  _explained(path, functools.partial(module_spec.loader.exec_module, module))
  return module


def _explained(path: Path, run: Callable):
  """The result of `run`; an exception in it becomes a message with its place in the file."""
  try:
    return run()
  except Exception as error:
    raise Refused(f"{_place(error, path)}: {_explanation(error)}") from error


def _place(error: Exception, path: Path) -> str:
  """file:line of the innermost frame in the experiment file or a sibling of it."""
  folder = path.resolve().parent
  if isinstance(error, SyntaxError) and error.filename:
    file, line = error.filename, error.lineno
  else:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).resolve().parent == folder]
    if not own:
      return str(path)
    file, line = own[-1].filename, own[-1].lineno
  file = os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
  return f"{file}:{line}"


def _explanation(error: Exception) -> str:
  if isinstance(error, Refused):
    return str(error)
  if isinstance(error, SyntaxError):
    return f"{type(error).__name__}: {error.msg}"
  message = f"{type(error).__name__}: {error}"
  if found := re.match(r"'(\w+)' object has no attribute '(\w+)'", str(error)):
    return _wrong_field(*found.groups()) or message
  if found := re.match(r"(\w+)\.__init__\(\) got an unexpected keyword.* '(\w+)'", str(error)):
    return _wrong_field(*found.groups()) or message
  if found := re.match(r"(\w+)\.__init__\(\) missing \d+ required keyword.*?: (.*)", str(error)):
    return f"{found[1]} also needs {found[2]}"
  if found := re.match(r"(\w+)\.__init__\(\) takes 1 positional", str(error)):
    return f"{found[1]} takes its fields by name, as in {found[1]}(field=value)"
  return message


def _wrong_field(class_name: str, field: str) -> str | None:
  for module in list(sys.modules.values()):
    cls = vars(module).get(class_name) if isinstance(module, ModuleType) else None
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
      names = [f.name for f in dataclasses.fields(cls)]
      if field not in names:
        return f"{class_name} has no field {field!r}{nearest(field, names)}"
  return None


def _near_files(path: Path) -> str:
  """Experiment files with a name like that of `path`, beside it or in experiments/."""
  folders = [path if path.is_dir() else path.parent, Path("experiments")]
  files = {str(file): file.stem for folder in folders for file in sorted(folder.glob("*.py"))}
  ranked = difflib.get_close_matches(path.stem, files.values(), n=3, cutoff=0.5) or files.values()
  names = [name for name, stem in files.items() if stem in ranked]
  return f"; there is {', '.join(names[:6])}" if names else ""


def _same_file(a: os.PathLike, b: os.PathLike) -> bool:
  return os.path.abspath(os.fspath(a)) == os.path.abspath(os.fspath(b))
