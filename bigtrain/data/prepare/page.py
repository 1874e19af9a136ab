"""The report as one self-contained HTML page: no scripts, no fonts or pictures from elsewhere."""

import html
import re
from typing import Any

from bigtrain.console import duration, human
from bigtrain.data.prepare.charts import curve, histogram

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;
color:#1c2430}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
p.lead{color:#5a6675;margin-top:.2rem}table{border-collapse:collapse;width:100%}
th{text-align:left;font-weight:600;color:#5a6675;font-size:.85rem}
td,th{padding:.3rem .6rem;border-bottom:1px solid #e4e8ee;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{height:.8rem;display:flex;border-radius:2px;overflow:hidden;background:#e4e8ee;min-width:10rem}
.on{background:#3b7dd8}.off{background:#e07b39}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.6rem .8rem;
border-radius:4px;margin:.2rem 0 .8rem;font-size:.82rem;max-height:14rem;overflow:auto}
.id{font-size:.8rem;color:#5a6675}.cards{display:flex;gap:1rem;flex-wrap:wrap}
.card{flex:1;border:1px solid #e4e8ee;border-radius:6px;padding:.6rem 1rem;min-width:8rem}
.card b{font-size:1.5rem;display:block;line-height:1.3}.card small{color:#5a6675}
.was{background:#fdeee4}.is{background:#e6f0fc}.was,.is{border-radius:3px;padding:.05rem .25rem;
font:.82rem/1.5 ui-monospace,monospace;overflow-wrap:anywhere;white-space:pre-wrap}
details{margin:.4rem 0}summary{cursor:pointer}
"""


def page(report: dict[str, Any], manifest: dict[str, Any]) -> str:
  """The page."""
  read = report["steps"][0]
  lost = read["documents"] - report["kept"]
  unread = sum(read["rejected"].values())
  code = manifest["code"]
  parts = [
    "<!doctype html><html lang=en><meta charset=utf-8><title>Prepared data</title>",
    f"<style>{STYLE}</style><h1>Prepared data</h1>",
    f"<p class=lead>{human(read['documents'])} documents read from {len(manifest['inputs']):,} "
    f"files ({human(read['read_bytes'])}B), {human(report['kept'])} kept, {human(lost)} rejected"
    f"{f', {human(unread)} unreadable' if unread else ''}. Made by bigtrain at revision "
    f"{html.escape(str(code['revision']))}.</p>",
    _cards(report["splits"]),
    "<h2>From step to step</h2>",
    _steps(report["steps"]),
    "<h2>Why documents were rejected</h2>",
    _reasons(report["steps"]),
    "<h2>What the steps changed</h2>",
    _changes(report["changes"]),
    "<h2>Length of documents</h2>",
    histogram(report["lengths"]["read"], report["lengths"]["kept"]),
    "<h2>Duplicates</h2>",
    _duplicates(report["most_frequent"], report["near"]),
  ]
  if report["shared_lines"]:
    parts += ["<h2>Lines that documents share</h2>", _lines(report["shared_lines"])]
  if "previous" in report:
    parts += ["<h2>Against the previous preparation</h2>", _previous(report["previous"])]
  parts += ["<h2>Time and memory</h2>", _stages(report["stages"])]
  samples = report["samples"]
  parts += ["<h2>Samples of what was kept</h2>", _samples({"kept": samples.get("kept", [])}, True)]
  others = {kind: found for kind, found in samples.items() if kind != "kept"}
  parts += ["<h2>Samples of what was rejected</h2>", _samples(others, False)]
  return "\n".join(parts) + "\n"


def _cards(splits: dict[str, dict]) -> str:
  total = max(sum(s["documents"] for s in splits.values()), 1)
  cards = (
    f"<div class=card>{name}<b>{s['documents']:,}</b><small>{s['documents'] / total:.1%} of the "
    f"documents, {human(s['bytes'])}B</small></div>"
    for name, s in splits.items()
  )
  return f"<div class=cards>{''.join(cards)}</div>"


def _steps(rows: list[dict]) -> str:
  total = max(rows[0]["documents"], 1)
  out = [
    "<table><tr><th>step<th class=n>documents in<th>kept, <span style='color:#c05f1f'>rejected"
    "</span> here<th class=n>rejected<th class=n>changed<th class=n>characters<th class=n>MB/s</tr>"
  ]
  for row in rows:
    rejected, came = sum(row["rejected"].values()), row["documents"]
    kept = came if row["name"] == "read" else came - rejected
    bar = f"<i class=on style='width:{100 * kept / total:.2f}%'></i>"
    bar += f"<i class=off style='width:{100 * (came - kept) / total:.2f}%'></i>"
    size = row.get("read_bytes") or row.get("chars_in") or 0
    speed = f"{size / 1e6 / row['seconds']:.1f}" if row.get("seconds") else ""
    moved = row.get("chars_changed", 0)
    cells = (came, rejected, row.get("changed", 0))
    came, rejected, changed = (f"{n:,}" if n else "" for n in cells)
    out.append(
      f"<tr><td>{html.escape(row['name'])}<td class=n>{came}<td><div class=bar>{bar}</div>"
      f"<td class=n>{rejected}<td class=n>{changed}<td class=n>{f'{moved:+,}' if moved else ''}"
      f"<td class=n>{speed}</tr>"
    )
  return "".join(out) + "</table>"


def _reasons(rows: list[dict]) -> str:
  found = [(row["name"], reason, n) for row in rows for reason, n in row["rejected"].items()]
  if not found:
    return "<p>None was.</p>"
  most = max(n for _, _, n in found)
  out = "<table><tr><th>step<th>reason<th class=n>documents<th></tr>"
  for step, reason, n in sorted(found, key=lambda f: -f[2]):
    bar = f"<i class=off style='width:{100 * n / most}%'></i>"
    bar = f"<div class=bar style='background:none'>{bar}</div>"
    out += f"<tr><td>{html.escape(step)}<td>{html.escape(reason)}<td class=n>{n:,}<td>{bar}</tr>"
  return out + "</table>"


def _changes(found: dict[str, list]) -> str:
  """The first place where a document differs, before and after the step."""
  if not found:
    return "<p>Nothing.</p>"
  out = "<table><tr><th>step<th>before<th>after</tr>"
  for step, samples in found.items():
    for i, sample in enumerate(samples):
      name = f"<td rowspan={len(samples)}>{html.escape(step)}" if i == 0 else ""
      cells = (html.escape(visible(sample[side])) for side in ("before", "after"))
      was, now = cells
      out += f"<tr>{name}<td><span class=was>{was}</span><td><span class=is>{now}</span></tr>"
  return out + "</table>"


def visible(text: str) -> str:
  """White space and control characters as signs."""
  signs = {"\t": "→", "\n": "↵\n", " ": "·"}
  shown = (signs.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
  # Single spaces between words are no news.
  return re.sub(r"(?<=\S)(?<!·)·(?=[^\s·])", " ", "".join(shown))


def _duplicates(most: list[dict], near: dict | None) -> str:
  out = ""
  if near is not None:
    chance = lambda s: 1 - (1 - s ** near["rows"]) ** near["bands"]
    left_out = near["left_out"]
    more = f" {left_out:,} more were not compared: too many met at once." if left_out else ""
    out += (
      f"<p>Near duplicates: {near['pairs']:,} pairs met in one of {near['bands']} bands of "
      f"{near['rows']} hashes and were compared exactly; {near['below_threshold']:,} of them were "
      f"below the threshold and so no duplicates.{more}</p>{curve(chance, near['threshold'])}"
    )
  if not most:
    return out + "<p>There are no duplicates.</p>"
  out += "<table><tr><th>kind<th class=n>copies<th>the one that stayed</tr>"
  for group in most:
    out += (
      f"<tr><td>{group['kind']}<td class=n>{group['copies']:,}<td><span class=id>"
      f"{html.escape(group['id'])}</span><br>{html.escape(group['text'])}</tr>"
    )
  return out + "</table>"


def _lines(found: list) -> str:
  rows = (f"<tr><td class=n>{n:,}<td>{html.escape(line)}</tr>" for n, line in found)
  return f"<table><tr><th class=n>documents<th>line</tr>{''.join(rows)}</table>"


def _stages(rows: list[dict]) -> str:
  total = max(sum(row["seconds"] for row in rows), 1e-9)
  out = "<table><tr><th>stage<th class=n>tasks<th class=n>time of all<th><th class=n>longest"
  out += "<th class=n>peak memory</tr>"
  for row in rows:
    bar = f"<i class=on style='width:{100 * row['seconds'] / total:.2f}%'></i>"
    out += (
      f"<tr><td>{row['name']}<td class=n>{row['tasks']:,}<td class=n>{_time(row['seconds'])}"
      f"<td><div class=bar>{bar}</div><td class=n>{_time(row['longest'])}"
      f"<td class=n>{human(row['peak_bytes'])}B</tr>"
    )
  return out + "</table>"


def _time(seconds: float) -> str:
  return f"{seconds:.2f} s" if seconds < 60 else duration(seconds)


def _previous(found: dict) -> str:
  out = (
    f"<p>Of {html.escape(found['folder'])}, {found['both']:,} documents are here again, "
    f"{found['gone']:,} are not, {found['added']:,} are new. {found['cluster_changed']:,} belong "
    f"to a cluster that changed, {found['split_changed']:,} therefore to another split.</p>"
  )
  if found["changed"]:
    rows = (f"<tr><td>{c['digest']}<td>{c['was']}<td>{c['now']}</tr>" for c in found["changed"])
    out += f"<table><tr><th>document<th>was in<th>is in</tr>{''.join(rows)}</table>"
  return out


def _samples(samples: dict[str, list], open_: bool) -> str:
  out = ""
  for kind, found in samples.items():
    out += f"<details{' open' if open_ else ''}><summary>{html.escape(kind)}</summary>"
    for sample in found:
      cut = " …" if sample["chars"] > len(sample["text"]) else ""
      out += f"<div class=id>{html.escape(sample['id'])}, {sample['chars']:,} characters</div>"
      out += f"<pre>{html.escape(sample['text'])}{cut}</pre>"
    out += "</details>"
  return out or "<p>There are none.</p>"
