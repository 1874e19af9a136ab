"""The report as one self-contained HTML page: no scripts, no fonts or pictures from elsewhere."""

import html
from typing import Any

from bigtrain.console import human

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
.card b{font-size:1.5rem;display:block}details{margin:.4rem 0}summary{cursor:pointer}
"""


def page(report: dict[str, Any], manifest: dict[str, Any]) -> str:
  """The page."""
  read = report["steps"][0]
  lost = read["documents"] - report["kept"]
  code = manifest["code"]
  parts = [
    "<!doctype html><html lang=en><meta charset=utf-8><title>Prepared data</title>",
    f"<style>{STYLE}</style><h1>Prepared data</h1>",
    f"<p class=lead>{human(read['documents'])} documents read from {len(manifest['inputs'])} files "
    f"({human(read['read_bytes'])}B), {human(report['kept'])} kept, {human(lost)} rejected. "
    f"Made by bigtrain at revision {html.escape(str(code['revision']))}.</p>",
    _cards(report["splits"]),
    "<h2>From step to step</h2>",
    _steps(report["steps"]),
    "<h2>Why documents were rejected</h2>",
    _reasons(report["steps"]),
    "<h2>Length of documents</h2>",
    histogram(report["lengths"]["read"], report["lengths"]["kept"]),
    "<h2>Most frequent duplicates</h2>",
    _duplicates(report["most_frequent"], report["near"]),
  ]
  if "previous" in report:
    parts += ["<h2>Against the previous preparation</h2>", _previous(report["previous"])]
  samples = report["samples"]
  parts += ["<h2>Samples of what was kept</h2>", _samples({"kept": samples.get("kept", [])}, True)]
  others = {kind: found for kind, found in samples.items() if kind != "kept"}
  parts += ["<h2>Samples of what was rejected</h2>", _samples(others, False)]
  return "\n".join(parts) + "\n"


def _cards(splits: dict[str, dict]) -> str:
  cards = (
    f"<div class=card>{name}<b>{human(s['documents'])}</b>{human(s['bytes'])}B</div>"
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
    rejected = sum(row["rejected"].values())
    came = row["documents"]
    kept = came if row["name"] == "read" else came - rejected
    bar = f"<i class=on style='width:{100 * kept / total:.2f}%'></i>"
    bar += f"<i class=off style='width:{100 * (came - kept) / total:.2f}%'></i>"
    moved = row.get("chars_out", 0) - row.get("chars_in", 0)
    size = row.get("chars_in") or row.get("read_bytes") or 0
    speed = f"{size / 1e6 / row['seconds']:.1f}" if row.get("seconds") else ""
    gone = row["name"] == "read" or "chars_in" not in row or rejected
    changed = f"{row['changed']:,}" if row.get("changed") else ""
    out.append(
      f"<tr><td>{html.escape(row['name'])}<td class=n>{came:,}<td><div class=bar>{bar}</div>"
      f"<td class=n>{rejected:,}<td class=n>{changed}"
    )
    out.append(f"<td class=n>{'' if gone else f'{moved:+,}'}<td class=n>{speed}</tr>")
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


def histogram(before: list[int], after: list[int]) -> str:
  """Two histograms over each other as SVG; bin b begins at 2**(b / 2) characters."""
  used = [b for b, n in enumerate(before) if n] + [b for b, n in enumerate(after) if n]
  if not used:
    return "<p>There are no documents.</p>"
  low, high, top = min(used), max(used) + 1, max([*before, *after])
  width, height, left = 900 / (high - low), 180, 50
  out = [f"<svg viewBox='0 0 960 {height + 60}' role=img style='width:100%;font-size:12px'>"]
  for b in range(low, high):
    x = left + (b - low) * width
    for n, colour, inset in ((before[b], "#c3cedb", 0.5), (after[b], "#3b7dd8", width * 0.2)):
      h = height * n / top
      box = f"x='{x + inset:.1f}' y='{10 + height - h:.1f}' width='{width - 2 * inset:.1f}'"
      title = f"{human(2 ** (b / 2))} to {human(2 ** ((b + 1) / 2))} characters: {n:,}"
      out.append(f"<rect {box} height='{h:.1f}' fill='{colour}'><title>{title}</title></rect>")
    if b % 2 == 0:
      out.append(
        f"<text x='{x:.0f}' y='{height + 26}' text-anchor=middle>{human(2 ** (b / 2))}</text>"
      )
  out.append(f"<line x1={left} x2=950 y1={10 + height} y2={10 + height} stroke='#5a6675'/>")
  out.append(f"<text x={left - 6} y=20 text-anchor=end>{human(top)}</text>")
  key = ((left, "#c3cedb", "read"), (left + 90, "#3b7dd8", "kept"))
  for x, colour, label in key:
    out.append(f"<rect x={x} y={height + 42} width=12 height=12 fill='{colour}'/>")
    out.append(f"<text x={x + 18} y={height + 53}>{label}</text>")
  out.append(f"<text x=950 y={height + 53} text-anchor=end>characters of a document</text></svg>")
  return "".join(out)


def _duplicates(most: list[dict], near: dict | None) -> str:
  out = ""
  if near is not None:
    recall = ", ".join(f"{r:.1%} at {s}" for s, r in near["recall"].items())
    out += (
      f"<p>Near: Jaccard similarity of at least {near['threshold']}. The bands "
      f"find {recall}. {near['pairs']:,} pairs met in a band; {near['below_threshold']:,} "
      "of them were below the threshold and so no duplicates.</p>"
    )
  if not most:
    return out + "<p>There are none.</p>"
  out += "<table><tr><th>kind<th class=n>copies<th>document that stayed</tr>"
  for group in most:
    out += (
      f"<tr><td>{group['kind']}<td class=n>{group['copies']:,}<td><span class=id>"
      f"{html.escape(group['id'])}</span><br>{html.escape(group['text'])}</tr>"
    )
  return out + "</table>"


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
