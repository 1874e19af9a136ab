"""What a report is made of: all that a run recorded, its values without secrets.

Nothing of it is believed: a line that is not what it should be is left out, a file that is not
there is empty. No link leads out of the run directory: what is read is the run's own. Of data that
the config names, numbers are read and no text, for it may name any folder.
"""

import base64
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from etils import epath

from bigtrain import goodput
from bigtrain.columns import Columns, columns
from bigtrain.config import Refused
from bigtrain.diagnose import Finding, Records, diagnose
from bigtrain.lines import read_events, read_object, read_rows
from bigtrain.run_directory import RunDirectory
from bigtrain.secrets import redacted

FILES = ("config.json", "environment.json", "data.json", "metrics.jsonl", "events.jsonl")
WHOLE, LISTED = 3, 200  # Incidents with their batches: so many first ones and last ones; others.
IMAGES, IMAGE_BYTES = 16, 2**18  # Of an incident: how many are shown, and how large each may be.
PNG = b"\x89PNG\r\n\x1a\n"
TEXT = 4000  # Characters of a batch or of a hang's stacks.


class Incident(NamedTuple):
  """A step that was not like the others, and its batch."""

  about: dict[str, Any]  # incident.json.
  whole: bool = False  # What is below is read too.
  text: str = ""  # Of the batch; empty where it has none.
  images: tuple[str, ...] = ()  # Of the batch, as data URIs.


class Recorded(NamedTuple):
  """A run's records."""

  name: str
  path: str
  config: dict[str, Any]  # {dotted path: value}; a class as the value of its path.
  environment: dict[str, Any]
  data: dict[str, Any]
  prepared: dict[str, dict[str, dict[str, int]]]  # How much, of folders that it trained on.
  events: list[dict[str, Any]]
  train: Columns
  evaluations: Columns
  layers: Columns
  account: goodput.Account
  findings: list[Finding] | None  # None where there was too little to look at.
  incidents: list[Incident]  # The first ones, and the last ones.
  met: int  # How many incidents there are.
  hangs: dict[str, str]  # The stacks of a process, by their file.

  def of(self, name: str) -> list[dict[str, Any]]:
    """The events of that name."""
    return [event for event in self.events if event["event"] == name]


def read(run_dir: str | os.PathLike) -> Recorded:
  """The records of a run, which may still be going on.

  Raises:
    Refused: there is no such directory, or no run in it, or one whose files are elsewhere.
    OSError: a file cannot be read.
  """
  directory = RunDirectory(run_dir, writes=False)
  path = directory.path
  if not path.exists():
    raise Refused(f"there is no run directory {run_dir}")
  if not any((path / name).exists() for name in ("config.json", "events.jsonl", "metrics.jsonl")):
    raise Refused(f"{run_dir} is no run directory: it has no config.json and no records")
  for name in FILES:
    if (path / name).exists() and not _is_own(path, path / name):
      raise Refused(
        f"{path / name} is not a file in {path}, but a link out of it, which is not followed, or "
        "something else: copy there what belongs there"
      )
  events = list(map(redacted, read_events(path / "events.jsonl")))
  rows = read_rows(path / "metrics.jsonl")
  of = lambda kind: columns([row for row in rows if row["kind"] == kind])
  train, evaluations, layers = of("train"), of("eval"), of("layers")
  records = Records(train, evaluations, layers, events)
  tree = read_object(path / "config.json")
  config = redacted(dict(_flat(redacted(tree))))
  folders = sorted((path / "incidents").glob("*"))
  return Recorded(
    name=path.name,
    path=str(path),
    config=config,
    environment=redacted(read_object(path / "environment.json")),
    data=redacted(read_object(path / "data.json")),
    prepared=dict(_prepared(tree)),
    events=events,
    train=train,
    evaluations=evaluations,
    layers=layers,
    account=goodput.account(events, [row for row in rows if row["kind"] == "train"]),
    findings=diagnose(records) if train else None,
    incidents=list(_incidents(path, folders)),
    met=len(folders),
    hangs={p.name: _text(p) for p in _own(path, (path / "hangs").glob("*.txt"))},
  )


def _is_own(run: epath.Path, path: epath.Path) -> bool:
  """Whether this is a file within the run; neither a link out of it nor a pipe, say."""
  if "://" in str(run):  # Where there are no links.
    return path.exists()
  real = os.path.realpath(path)
  return os.path.isfile(real) and Path(real).is_relative_to(os.path.realpath(run))


def _own(run: epath.Path, paths: Iterable[epath.Path]) -> list[epath.Path]:
  return sorted(path for path in paths if _is_own(run, path))


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted path, value) of all leaves; what has a class is one too."""
  if isinstance(tree, dict):
    if path and isinstance(tree.get("class"), str):
      yield path, tree["class"].split(":")[-1]
    for name, value in tree.items():
      if name != "class":
        yield from _flat(value, f"{path}.{name}" if path else name)
  elif isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
    for i, item in enumerate(tree):
      yield from _flat(item, f"{path}.{i}")
  else:
    yield path, tree


def _prepared(tree: Any) -> Iterator[tuple[str, dict[str, dict[str, int]]]]:
  """How much `bigtrain data prepare` read and kept, where that is still where the config says."""
  for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
    yield from _prepared(item)
  if isinstance(tree, dict) and str(tree.get("class")).endswith(":PreparedText"):
    folder = str(tree.get("path"))
    path = Path(os.path.expanduser(folder), "manifest.json")
    if "://" not in folder and os.path.isfile(path):
      yield folder, _amounts(read_object(path))


def _amounts(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
  inputs, splits = manifest.get("inputs"), manifest.get("splits")
  inputs = [i for i in inputs if isinstance(i, dict)] if isinstance(inputs, list) else []
  found = {"inputs": {"files": len(inputs), "bytes": sum(_whole(i, "bytes") for i in inputs)}}
  for name in ("train", "validation"):
    if isinstance(splits, dict) and isinstance(split := splits.get(name), dict):
      found[name] = {key: _whole(split, key) for key in ("documents", "bytes")}
  return found


def _whole(record: dict[str, Any], name: str) -> int:
  return number if type(number := record.get(name)) is int else 0


def _incidents(run: epath.Path, folders: list[epath.Path]) -> Iterator[Incident]:
  whole = {*folders[:WHOLE], *folders[-WHOLE:]}
  for folder in [*folders[: WHOLE + LISTED], *folders[WHOLE + LISTED :][-WHOLE:]]:
    of_it = lambda pattern, folder=folder: _own(run, folder.glob(pattern))
    for about in filter(None, map(read_object, of_it("incident.json"))):
      found = Incident(redacted(about))
      if folder in whole:
        images = filter(None, map(_image, of_it("batch-*.png")[:IMAGES]))
        text = "".join(map(_text, of_it("batch.txt")))
        found = found._replace(whole=True, text=text, images=tuple(images))
      yield found


def _text(path: epath.Path) -> str:
  """The beginning of a file."""
  with path.open("rb") as file:
    data = file.read(4 * TEXT + 1)
  text = redacted(data.decode(errors="replace"))
  return text if len(text) <= TEXT else f"{text[:TEXT]} …"


def _image(path: epath.Path) -> str:
  """A picture as a data URI; empty for what is none, or too large."""
  with path.open("rb") as file:
    data = file.read(IMAGE_BYTES + 1)
  whole = data.startswith(PNG) and len(data) <= IMAGE_BYTES
  return f"data:image/png;base64,{base64.b64encode(data).decode()}" if whole else ""


def names(runs: list[Recorded]) -> list[str]:
  """What to call each run: its directory, with those above where two have the same."""
  parts = [PurePath(run.path).parts for run in runs]
  for depth in range(1, max(map(len, parts)) + 1):
    found = ["/".join(p[-depth:]) for p in parts]
    if len(set(found)) == len(found):
      return found
  return [f"{run.name} ({i})" for i, run in enumerate(runs, 1)]
