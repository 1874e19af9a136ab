"""Running a preparation: the stages in order, and what makes the same command go on after a kill.

The folder holds config.json, shards/, rejected/, assignment/, report.html, report.json, and, last
of all, manifest.json. work/ is what the stages hand on, and may be deleted when all is done.
"""

import errno
import os
import pathlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from bigtrain import hints
from bigtrain.config import Refused, diff
from bigtrain.console import say
from bigtrain.data.prepare import near, shared_lines
from bigtrain.data.prepare.clean import clean, task
from bigtrain.data.prepare.engine import Stage, Watch, done
from bigtrain.data.prepare.exact import exact
from bigtrain.data.prepare.files import PART, read_json, write_json
from bigtrain.data.prepare.pack import learn_tokenizer, pack
from bigtrain.data.prepare.recipe import Prepare
from bigtrain.data.prepare.report import finish
from bigtrain.load import read, write

# What a preparation imports, and the package that has it.
PACKAGES = {
  "datatrove": "datatrove",
  "spacy": "spacy",
  "ftfy": "ftfy",
  "trafilatura": "trafilatura",
  "warcio": "warcio",
  "fasttext": "fasttext-predict",
}


def prepare(
  recipe: Prepare, out: str | os.PathLike, file: pathlib.Path | None = None
) -> dict[str, Any] | None:
  """Prepares the data in the folder `out`, or goes on with what is there.

  Args:
    recipe: what to do.
    out: the folder.
    file: the file that the recipe was loaded from, for the classes it defines.

  Returns:
    The manifest; None if the work was queued elsewhere and is not done.

  Raises:
    Refused: the recipe cannot work, the folder is of another recipe or of other input, or no
      document is left in the end.
  """
  from filelock import FileLock, Timeout

  if missing := [name for module, name in PACKAGES.items() if find_spec(module) is None]:
    raise Refused(f"preparing text needs {', '.join(missing)}: {hints.installed('data')}")
  recipe.check()
  out = pathlib.Path(out)
  try:
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=1)
    lock.acquire()
  except Timeout:
    raise Refused(
      f"another process is at work in {out}; wait for it or take another --out"
    ) from None
  except OSError as error:
    raise Refused(f"{out} cannot be written: {error.strerror}; take another --out") from error
  try:
    _begin(recipe, out, file)
    return _run(recipe, out)
  except OSError as error:
    raise _explained(error, out) from error
  finally:
    lock.release()


def _explained(error: OSError, out: pathlib.Path) -> OSError:
  """The error, if it is another one than that the disk is full."""
  if error.errno not in (errno.ENOSPC, errno.EDQUOT):
    return error
  return OSError(f"the disk of {out} is full; make room, and the same command goes on")


def stages(recipe: Prepare, out: pathlib.Path) -> list[Stage]:
  """All that is to do, in order."""
  found = [Stage("clean", [task(clean, out)], recipe.tasks)]
  if recipe.exact == "remove":
    found.append(Stage("exact", [task(exact, out)], recipe.tasks))
  if recipe.near is not None:
    found += near.stages(recipe.near, out, recipe.tasks)
  if recipe.lines is not None:
    found += shared_lines.stages(out, recipe.tasks)
  found.append(Stage("pack", [task(pack, out)], recipe.tasks))
  if recipe.tokenizer is not None:
    found.append(Stage("tokenizer", [task(learn_tokenizer, out)], 1))
  return [*found, Stage("report", [task(finish, out)], 1)]


def _begin(recipe: Prepare, out: pathlib.Path, file: pathlib.Path | None) -> None:
  """Writes down recipe and input, or compares them with what is there."""
  try:
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in recipe.files()]
  except OSError as error:
    raise Refused(f"{error.filename}: {error.strerror}") from None
  inputs = out / "work" / "inputs.json"
  if not (inputs.exists() or _finished(out)):
    left = {p.name for p in out.iterdir()} - {".lock", "work", "config.json", "experiment.py"}
    if left:
      raise Refused(f"{out} holds other files, such as {min(left)}: take another --out")
    write(recipe, out, file)
    write_json(inputs, files)
    return
  before, _ = read(out, Prepare)
  # Where the work runs changes nothing of the result.
  changes = [line for line in diff(before, recipe) if not line.startswith("engine")]
  if changes:
    raise Refused(f"{out} was begun with another config: {'; '.join(changes)}; take another --out")
  if not inputs.exists():
    return
  old, new = {f[0]: f[1:] for f in read_json(inputs)}, {f[0]: f[1:] for f in files}
  if old != new:
    first, *others = [p for p in sorted(old.keys() | new.keys()) if old.get(p) != new.get(p)]
    more = f" and {len(others)} more" if others else ""
    raise Refused(
      f"the input of {out} has changed since: {first}{more}; take another --out (and --previous "
      f"{out} to compare the splits)"
    )
  write(recipe, out, file)


def _finished(out: pathlib.Path) -> bool:
  """Whether all is done: the manifest is written last, and work/ may be gone by then."""
  return (out / "manifest.json").exists()


def _run(recipe: Prepare, out: pathlib.Path) -> dict[str, Any] | None:
  os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's bars, read where it is imported.
  todo = stages(recipe, out)
  total, before = sum(s.tasks for s in todo), sum(done(out, s) for s in todo)
  if _finished(out):
    say(f"{out} is finished: nothing to do")
    return _manifest(out)
  if not recipe.engine.at_work(out):
    for left in out.rglob(f"*{PART}"):
      left.unlink()
    if before:
      say(f"going on with {out}: {before} of {total} tasks are done")
    _work(recipe, todo, out, total, before)
  if not _finished(out):
    say(f"queued; the same command tells how far it is ({sum(done(out, s) for s in todo)}/{total})")
    return None
  return _manifest(out)


def _manifest(out: pathlib.Path) -> dict[str, Any]:
  """Of a finished preparation.

  Raises:
    Refused: nothing is left of the input.
  """
  manifest = read_json(out / "manifest.json")
  if not any(split["documents"] for split in manifest["splits"].values()):
    steps = {s["name"]: s["rejected"] for s in read_json(out / "report.json")["steps"]}
    most = max(steps, key=lambda name: sum(steps[name].values()))
    why = ", ".join(f"{n:,} x {reason}" for reason, n in steps[most].items())
    raise Refused(
      f"no document is left: the step {most} rejected the most ({why}); {out}/report.html shows "
      "some of them; change the recipe, and take another --out"
    )
  return manifest


def _work(recipe: Prepare, todo: list[Stage], out: pathlib.Path, total: int, before: int) -> None:
  """Runs the engine, with a bar for those who look on, else with a line for each stage."""
  from rich.console import Console
  from rich.progress import Progress

  console = Console(stderr=True)
  if not console.is_terminal:
    n = len(recipe.files())
    say(f"preparing {n} file{'s' * (n != 1)} in {out}, by {total} tasks")
    with Watch(todo, out, _lines(total)):
      recipe.engine.run(todo, out)
    return
  with Progress(console=console, transient=True) as bar:
    shown = bar.add_task("preparing", total=total, completed=before)
    tell = lambda name, n: bar.update(shown, description=name.ljust(10), completed=n)
    with Watch(todo, out, tell):
      recipe.engine.run(todo, out)


def _lines(total: int) -> Callable[[str, int], None]:
  """Says when another stage has begun."""
  before = ""

  def tell(stage: str, completed: int) -> None:
    nonlocal before
    if stage not in (before, ""):
      say(f"{stage}: {completed} of {total} tasks are done")
    before = stage

  return tell
