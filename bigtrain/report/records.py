"""What a report is made of: all that a run recorded, its values without secrets.

Nothing of it is believed: a line that is not what it should be is left out, a file that is not
there is empty.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

from etils import epath

from bigtrain import goodput
from bigtrain.columns import Columns, columns
from bigtrain.config import Refused
from bigtrain.diagnose import Finding, Records, diagnose
from bigtrain.lines import read_events, read_rows
from bigtrain.run_directory import RunDirectory
from bigtrain.secrets import redacted

IMAGES, IMAGE_BYTES = 32, 2**18  # Of an incident: how many are shown, and how large each may be.
PNG = b"\x89PNG\r\n\x1a\n"
TEXT = 4000  # Characters of a batch or of a hang's stacks.


class Incident(NamedTuple):
  """A step that was not like the others, and its batch."""

  about: dict[str, Any]  # incident.json.
  text: str  # Of the batch; empty where it has none.
  images: list[str]  # Of the batch, as data URIs.


class Recorded(NamedTuple):
  """A run's records."""

  name: str
  path: str
  config: dict[str, Any]  # {dotted path: value}; a class as the value of its path.
  environment: dict[str, Any]
  data: dict[str, Any]
  prepared: dict[str, dict[str, Any]]  # Manifests of the prepared folders that it trained on.
  events: list[dict[str, Any]]
  train: Columns
  evaluations: Columns
  layers: Columns
  account: goodput.Account
  findings: list[Finding] | None  # None where there was too little to look at.
  incidents: list[Incident]
  hangs: dict[str, str]  # The stacks of a process, by their file.

  def of(self, name: str) -> list[dict[str, Any]]:
    """The events of that name."""
    return [event for event in self.events if event["event"] == name]


def read(run_dir: str | os.PathLike) -> Recorded:
  """The records of a run, which may still be going on.

  Raises:
    Refused: there is no such directory, or no run in it.
  """
  directory = RunDirectory(run_dir, writes=False)
  path = directory.path
  if not path.exists():
    raise Refused(f"there is no run directory {run_dir}")
  if not any((path / name).exists() for name in ("config.json", "events.jsonl", "metrics.jsonl")):
    raise Refused(f"{run_dir} is no run directory: it has no config.json and no records")
  events = list(map(redacted, read_events(path / "events.jsonl")))
  rows = read_rows(path / "metrics.jsonl")
  of = lambda kind: columns([row for row in rows if row["kind"] == kind])
  train, evaluations, layers = of("train"), of("eval"), of("layers")
  records = Records(train, evaluations, layers, events)
  tree = _json(path / "config.json")
  config = dict(item for pair in _flat(tree) for item in redacted(dict([pair])).items())
  return Recorded(
    name=path.name,
    path=str(path),
    config=config,
    environment=redacted(_json(path / "environment.json")),
    data=redacted(_json(path / "data.json")),
    prepared=dict(_prepared(tree)),
    events=events,
    train=train,
    evaluations=evaluations,
    layers=layers,
    account=goodput.account(events, [row for row in rows if row["kind"] == "train"]),
    findings=diagnose(records) if train else None,
    incidents=list(_incidents(path / "incidents")),
    hangs={p.name: _text(p) for p in sorted((path / "hangs").glob("*.txt"))},
  )


def _json(path: epath.Path) -> dict[str, Any]:
  """The object in a file; empty where there is none."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


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


def _prepared(tree: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """The manifests of `bigtrain data prepare` that are still where the config says."""
  for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
    yield from _prepared(item)
  if isinstance(tree, dict) and str(tree.get("class")).endswith(":PreparedText"):
    folder = str(tree.get("path"))
    if found := _json(epath.Path(os.path.expanduser(folder)) / "manifest.json"):
      yield folder, redacted(found)


def _incidents(folder: epath.Path) -> Iterator[Incident]:
  for path in sorted(folder.glob("*")) if folder.exists() else ():
    if about := _json(path / "incident.json"):
      images = [_image(p) for p in sorted(path.glob("batch-*.png"))[:IMAGES]]
      yield Incident(redacted(about), _text(path / "batch.txt"), [i for i in images if i])


def _text(path: epath.Path) -> str:
  """The beginning of a file."""
  if not path.exists():
    return ""
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
