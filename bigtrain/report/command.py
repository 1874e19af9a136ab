"""`bigtrain report RUN [RUN ...] [--out FILE]`."""

import inspect
import os

from etils import epath

from bigtrain import files
from bigtrain.config import Refused, config
from bigtrain.flags import parse
from bigtrain.hints import command as spelt


@config
class Report:
  """Writes what runs recorded as one HTML file, which needs nothing else to be looked at.

  One that still goes on is reported as far as it has come. Several are shown beside each other,
  with what differs between their configs.
  """

  out: str | None = None  # The file; RUN/report.html of the first run unless given.


def command(arguments: list[str]) -> None:
  """bigtrain report RUN [RUN ...] [--out FILE]."""
  runs = []
  while len(runs) < len(arguments) and not arguments[len(runs)].startswith("-"):
    runs.append(arguments[len(runs)])
  prog = spelt(f"report {' '.join(runs) or 'RUN [RUN ...]'}", extra="report")
  [chosen] = parse([Report()], arguments[len(runs) :], prog, inspect.getdoc(Report) or "")
  if not runs:
    example = spelt("report runs/quickstart", extra="report")
    raise Refused(f"bigtrain report takes run directories first: {example}")
  print(report(runs, chosen.out))


def report(runs: list[str], out: str | None = None) -> epath.Path:
  """Writes the report of runs; returns the file.

  Raises:
    Refused: a directory holds no run, or none that can be read; matplotlib is not there; or the
      file cannot be written.
  """
  from bigtrain.report.page import page
  from bigtrain.report.records import names, read
  from bigtrain.report.svg import check_library

  try:
    found = [read(run) for run in runs]
  except OSError as error:
    raise Refused(f"cannot read {error.filename}: {error.strerror or error}") from error
  check_library()
  made = page(found, names(found))
  path = epath.Path(os.path.expanduser(out) if out else f"{found[0].path}/report.html")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, made)
  except OSError as error:
    raise Refused(f"cannot write {path}: {error.strerror or error}; choose --out") from error
  return path
