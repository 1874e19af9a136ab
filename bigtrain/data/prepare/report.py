"""The last stage: counts of all tasks added up, the manifest, and the report as JSON and HTML."""

import collections
import pathlib
from importlib.metadata import version
from typing import Any

import numpy as np

from bigtrain.config import dump
from bigtrain.data.prepare.clean import recipe_of
from bigtrain.data.prepare.files import read_json, whole, write_json
from bigtrain.data.prepare.pack import (
  EXACT,
  LINES,
  NEAR,
  ONLY_SHARED,
  RESIDUE,
  SPLITS,
  split_of,
)
from bigtrain.data.prepare.page import page
from bigtrain.data.prepare.recipe import FORMAT, Prepare
from bigtrain.data.prepare.shared_lines import frequent
from bigtrain.run_directory import revision

MOST = 10  # Duplicates shown.
SHOWN = 3  # Samples of one reason.


def finish(out: str, _: Any, rank: int, world_size: int) -> None:
  """The task: writes report.json, report.html and manifest.json."""
  recipe, folder = recipe_of(out), pathlib.Path(out)
  made = [read_json(folder / "work" / "clean" / f"{r:05}.json") for r in range(recipe.tasks)]
  packed = [read_json(folder / "work" / "pack" / f"{r:05}.json") for r in range(recipe.tasks)]
  splits = {name: _split([p["shards"][name] for p in packed]) for name in SPLITS}
  manifest = {
    "format": FORMAT,
    "code": {"revision": revision(), "datatrove": version("datatrove")},
    "settings": {k: v for k, v in dump(recipe).items() if k != "engine"},
    "inputs": [{"file": p, "bytes": n} for p, n, _ in read_json(folder / "work" / "inputs.json")],
    "splits": {name: {k: s[k] for k in ("documents", "bytes")} for name, s in splits.items()},
    "shards": [shard for split in splits.values() for shard in split["shards"]],
    "tokenizer": "tokenizer.json" if (folder / "tokenizer.json").exists() else None,
  }
  report = _report(recipe, folder, made, packed) | {"splits": manifest["splits"]}
  if recipe.previous is not None:
    report["previous"] = compared(recipe, pathlib.Path(recipe.previous), folder)
  write_json(folder / "report.json", report)
  with whole(folder / "report.html") as file:
    file.write(page(report, manifest).encode())
  write_json(folder / "manifest.json", manifest)


def _split(shards: list[list[dict]]) -> dict[str, Any]:
  flat = [shard for task in shards for shard in task]
  sums = {k: sum(shard[k] for shard in flat) for k in ("documents", "bytes")}
  return sums | {"shards": flat}


def _report(recipe: Prepare, folder: pathlib.Path, made: list, packed: list) -> dict[str, Any]:
  """What the report shows, added up over the tasks."""
  rows = [_row("read", [m["read"] for m in made], read_bytes=sum(m["bytes"] for m in made))]
  names = [s["name"] for s in made[0]["steps"]]
  rows += [_row(name, [m["steps"][i] for m in made]) for i, name in enumerate(names)]
  gone = sum((collections.Counter(p["counts"]) for p in packed), collections.Counter())
  left = rows[-1]["documents"] - (sum(rows[-1]["rejected"].values()) if names else 0)
  for name, on, reasons in (
    ("exact duplicates", recipe.exact == "remove", (EXACT,)),
    ("near duplicates", recipe.near is not None, (NEAR,)),
    (LINES, recipe.lines is not None, (ONLY_SHARED, RESIDUE)),
  ):
    if on:
      rejected = {reason: gone[reason] for reason in reasons if gone[reason]}
      rows.append({"name": name, "documents": left, "rejected": rejected})
      left -= sum(rejected.values())
  if recipe.lines is not None:
    rows[-1] |= {"changed": gone["trimmed"], "chars_changed": -gone["chars removed"]}
  summed = lambda parts: np.sum(list(parts), axis=0).tolist()
  texts = {int(hashed): line for p in packed for hashed, line in p["lines"].items()}
  return {
    "steps": rows,
    "kept": left,
    "stages": _stages(folder),
    "lengths": {
      "read": summed(m["lengths"]["read"] for m in made),
      "kept": summed(p["lengths"] for p in packed),
    },
    "changes": _changes([m["changes"] for m in made]),
    "samples": _samples([m["samples"] for m in made] + [p["samples"] for p in packed]),
    "most_frequent": _most(folder, {k: v for p in packed for k, v in p["excerpts"].items()}),
    "shared_lines": [[n, texts[hashed]] for hashed, n in frequent(folder).items()],
    "near": _near(recipe, folder),
  }


def _stages(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What time and memory the tasks of each stage took, but of this one, in order."""
  found = []
  for stage in (folder / "work" / "spent").iterdir():
    spent = [read_json(path) for path in stage.glob("*.json")]
    seconds = [s["seconds"] for s in spent]
    peak = max(s["peak_bytes"] for s in spent)
    began = min(path.stat().st_mtime_ns for path in stage.glob("*.json"))
    found.append((began, stage.name, len(spent), sum(seconds), max(seconds), peak))
  keys = ("name", "tasks", "seconds", "longest", "peak_bytes")
  return [dict(zip(keys, values, strict=True)) for _, *values in sorted(found)]


def _row(name: str, parts: list[dict], **more: Any) -> dict[str, Any]:
  sums = {k: sum(p[k] for p in parts) for k in parts[0] if k not in ("rejected", "name")}
  rejected = sum((collections.Counter(p["rejected"]) for p in parts), collections.Counter())
  return {"name": name, **sums, "rejected": dict(rejected.most_common()), **more}


def _best(parts: list[dict[str, list]]) -> dict[str, list]:
  """A few samples of each kind, the same ones however the work was cut."""
  found = collections.defaultdict(list)
  for part in parts:
    for kind, samples in part.items():
      found[kind] += samples
  return {kind: sorted(samples, reverse=True)[:SHOWN] for kind, samples in sorted(found.items())}


def _samples(parts: list[dict[str, list]]) -> dict[str, list]:
  return {
    kind: [{"id": i, "text": text, "chars": n} for _, i, text, n in samples]
    for kind, samples in _best(parts).items()
  }


def _changes(parts: list[dict[str, list]]) -> dict[str, list]:
  """By step, in their order, places before and after it; their kinds begin with the number."""
  return {
    kind[4:]: [{"id": i, "before": before, "after": after} for _, i, before, after in samples]
    for kind, samples in _best(parts).items()
  }


def _most(folder: pathlib.Path, excerpts: dict[str, list]) -> list[dict[str, Any]]:
  """The documents with the most duplicates, exact and near ones apart."""
  found = []
  for kind, pattern in (("exact", "exact/*.json"), ("near", "select/most.json")):
    groups = [g for path in (folder / "work").glob(pattern) for g in read_json(path)]
    for copies, digest in sorted(groups, key=lambda g: (-g[0], g[1]))[:MOST]:
      name, text = excerpts.get(digest, ["", "(itself a near duplicate of another)"])
      found.append({"kind": kind, "copies": copies, "id": name, "text": text})
  return found


def _near(recipe: Prepare, folder: pathlib.Path) -> dict[str, Any] | None:
  if recipe.near is None:
    return None
  found = [read_json(p) for p in (folder / "work" / "verified").glob("*.json")]
  return {
    "pairs": sum(f["pairs"] for f in found),
    "below_threshold": sum(f["below_threshold"] for f in found),
    "left_out": sum(f["left_out"] for f in found),
    "threshold": recipe.near.threshold,
    "bands": recipe.near.bands,
    "rows": recipe.near.rows,
  }


def compared(recipe: Prepare, previous: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
  """What became of the documents of an earlier preparation.

  A document changes its split only if its cluster has got a document with a smaller digest, or lost
  the one it was named by. One residue class of the digests is in memory at a time.
  """
  old_recipe = recipe_of(str(previous))
  counts: collections.Counter[str] = collections.Counter()
  changed = []
  for part in range(recipe.tasks):
    old, new = (_assignment(f, part, recipe.tasks) for f in (previous, folder))
    _, i, j = np.intersect1d(old[:, 0], new[:, 0], assume_unique=True, return_indices=True)
    was, now = split_of(old[i, 1], old_recipe), split_of(new[j, 1], recipe)
    cluster, split = old[i, 1] != new[j, 1], was != now
    counts.update(
      both=len(i),
      gone=len(old) - len(i),
      added=len(new) - len(j),
      cluster_changed=int(cluster.sum()),
      split_changed=int(split.sum()),
    )
    for k in np.flatnonzero(split):
      digest = f"{int(old[i[k], 0]):016x}"
      changed.append({"digest": digest, "was": SPLITS[was[k]], "now": SPLITS[now[k]]})
  return {"folder": str(previous), **counts, "changed": changed}


def _assignment(folder: pathlib.Path, part: int, parts: int) -> np.ndarray:
  """(digest, cluster) of the documents with digest = part mod parts, each once."""
  found = [np.zeros((0, 2), np.uint64)]
  for path in sorted((folder / "assignment").glob("*.npy")):
    rows = np.load(path, mmap_mode="r")
    found.append(rows[rows[:, 0] % np.uint64(parts) == part])
  rows = np.concatenate(found)
  return rows[np.unique(rows[:, 0], return_index=True)[1]]
