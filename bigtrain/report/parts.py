"""The sections of a report that are not charts, each of one run."""

import itertools
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bigtrain.console import human
from bigtrain.report.charts import KINDS, split_bar, time_line
from bigtrain.report.elements import Html, el, joined, number, span, table
from bigtrain.report.records import Incident, Recorded

SAMPLES = 12  # Of one prompt.
STARTS = 40  # That are shown at once.
LAYERS = 8  # Of an incident.
MEANING = {
  "compute": "steps that were kept, but for what they waited",
  "input wait": "the host waited for batches; devices may have been busy meanwhile",
  "compile": "programs were compiled, or read from the cache",
  "checkpoint": "saving, as far as steps waited for it, and until the last was durable",
  "evaluation": "held-out metrics and samples",
  "restore": "checkpoints were read",
  "start-up": "data, initialisation, and all else before the first step",
  "lost work": "steps and evaluations that a later start had to do again",
  "idle": "nothing ran between a start's last sign of life and the next start",
  "other": "incidents that were examined, and phases of the run's own",
}
ENDS = {"end": "done", "left": "left on a signal", "error": "failed", "killed": "no end recorded"}


def findings(run: Recorded) -> Html:
  """What `bigtrain diagnose` says."""
  if run.findings is None:
    return el("p", "No step has been logged, so nothing is known of its health.", class_="note")
  if not run.findings:
    steps = f"{run.train['step'][-1]:,.0f} steps"
    told = f"Nothing is wrong that {steps} would show."
    layers = "" if run.layers else " Layers were not looked at: the run records none."
    return el("div", el("p", told + layers), class_="finding good")
  return joined(
    el(
      "div",
      el("b", f.kind.capitalize()),
      el("p", f"{f.evidence}. {f.remedy}."),
      class_=f"finding {f.severity}",
    )
    for f in run.findings
  )


def differences(runs: Sequence[Recorded], names: Sequence[str]) -> Html:
  """The fields of the configs that are not the same in all runs."""
  if len(runs) == 1:
    return Html("")
  fields = dict.fromkeys(name for run in runs for name in run.config)
  missing = object()
  rows = []
  for name in fields:
    values = [run.config.get(name, missing) for run in runs]
    if any(value != values[0] for value in values[1:]):
      rows.append([name, *("–" if value is missing else _value(value) for value in values)])
  if not rows:
    return el("p", "Their configs are equal.", class_="note")
  return table(["Field", *names], rows, kind="stack")


def times(run: Recorded) -> Html:
  """What the time went to, over all starts."""
  spent = run.account
  if not spent.attempts:
    return el("p", "No start is recorded.", class_="note")
  whole = spent.wall or 1.0
  dot = lambda kind: el("i", class_="dot", style=f"background:var(--{KINDS[kind]})")
  rows = [
    [joined([dot(kind), kind.capitalize()]), span(s), f"{s / whole:.1%}", MEANING[kind]]
    for kind, s in spent.seconds.items()
    if s
  ]
  told = (
    f"{spent.goodput:.1%} of {span(spent.wall)} was compute that was kept, over "
    f"{len(spent.attempts)} start{'s' * (len(spent.attempts) != 1)}."
  )
  return joined([
    el("p", told),
    split_bar(spent.seconds),
    table(["Time went to", "Time", "Share", ""], rows, numbers=(1, 2), kind="spent"),
    time_line(run),
    _starts(run),
    _rescued(run),
  ])  # fmt: skip


def _starts(run: Recorded) -> Html:
  rows = list(_attempts(run))
  head = ["Start", "Began (UTC)", "Lasted", "From step", "Devices", "Ended"]
  show = lambda rows: table(head, rows, numbers=(2, 3), kind="stack starts")
  pieces = [el("h3", "Starts"), show(rows[-STARTS:])]
  if before := rows[:-STARTS]:
    pieces.append(el("details", el("summary", f"{len(before):,} earlier ones"), show(before)))
  return joined(pieces)


def _attempts(run: Recorded) -> Iterator[list[Any]]:
  starts, errors = run.of("start"), run.of("error")
  resumes = run.of("resume")
  for i, a in enumerate(run.account.attempts, 1):
    start = starts[i - 1]
    devices = f"{number(start.get('devices'))} in {number(start.get('processes'))} process"
    devices += "es" * (start.get("processes") != 1)
    ended = ENDS.get(a.outcome, a.outcome)
    if i == len(run.account.attempts) and a.outcome == "killed":
      ended = "running, or no end recorded"
    again = [r for r in resumes if i < len(starts) and starts[i]["time"] <= r["time"]][:1]
    if again and again[0].get("lost_steps"):
      ended += f"; {number(again[0]['lost_steps'])} steps were done again"
    inside = [e for e in errors if a.began <= e["time"] <= a.ended]
    if inside and a.outcome == "error":
      ended += f": {str(inside[-1].get('error'))[:300]}"
    day = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(a.began))
    step = "–" if a.step is None else number(a.step)
    yield [i, day, span(a.ended - a.began), step, devices, ended]


def _rescued(run: Recorded) -> Html:
  """What else happened to the run as such."""
  told = ("damaged", "hang", "straggler", "rollback", "signal", "restart", "weights_told")
  rows = [
    [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(e["time"])), e["event"], _fields(e)]
    for e in run.events
    if e["event"] in told
  ]
  head = ["Time (UTC)", "Event", ""]
  pieces = [el("h3", "Events"), table(head, rows, kind="stack events")] if rows else []
  for name, text in run.hangs.items():
    pieces.append(el("details", el("summary", f"Stacks of {name}"), el("pre", text)))
  return joined(pieces)


def _fields(record: dict[str, Any]) -> str:
  kept = {k: v for k, v in record.items() if k not in ("time", "event", "kind")}
  return ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in kept.items())


def incidents(run: Recorded) -> Html:
  """Steps that were not like the others; the first and the last with what they were trained on."""
  pieces = []
  for whole, found in itertools.groupby(run.incidents, lambda incident: incident.whole):
    show = _fully if whole else _briefly
    pieces.append(show(found))
  if missing := run.met - len(run.incidents):
    pieces.append(el("p", f"{missing:,} more are not shown.", class_="note"))
  return joined(pieces)


def _fully(incidents: Iterable[Incident]) -> Html:
  return joined(map(_incident, incidents))


def _briefly(incidents: Iterable[Incident]) -> Html:
  """Each in a row."""
  names = ("step", "kind", "cause", "first_bad", "loss", "gradient_norm")
  rows = [[_value(found.about.get(name)) for name in names] for found in incidents]
  head = [name.replace("_", " ").capitalize() for name in names]
  return table(head, rows, numbers=(0, 4, 5), kind="stack")


def _incident(found: Incident) -> Html:
  about = {k: v for k, v in found.about.items() if k not in ("layers", "kind", "step")}
  layers = found.about.get("layers")
  title = f"Step {_value(found.about.get('step'))}: {_value(found.about.get('kind'))}"
  label = lambda name: el("small", name.replace("_", " ").capitalize())
  facts = (el("div", label(name), _value(value)) for name, value in about.items())
  pieces = [el("h3", title), el("div", *facts, class_="few")]
  if isinstance(layers, dict) and layers:
    rows = [[name, _value(value)] for name, value in list(layers.items())[:LAYERS]]
    more = f" of {len(layers):,}" if len(layers) > LAYERS else ""
    told = el("summary", f"Layers ({len(rows)}{more})")
    pieces.append(el("details", told, table([], rows, numbers=(1,))))
  if found.images:
    pictures = (el("img", src=image, alt=f"row {i} of the batch") for i, image in
                enumerate(found.images))  # fmt: skip
    pieces.append(el("div", *pictures, class_="images"))
  if found.text:
    pieces.append(el("pre", found.text))
  return el("div", *pieces, class_="panel")


def samples(run: Recorded) -> Html:
  """How prompts were continued, over the steps."""
  by_prompt: dict[str, list[dict[str, Any]]] = {}
  for event in run.of("text"):
    by_prompt.setdefault(str(event.get("prompt")), []).append(event)
  pieces = []
  for prompt, events in by_prompt.items():
    chosen = np.unique(np.linspace(0, len(events) - 1, SAMPLES).astype(int))
    *before, last = [_sample(events[i], prompt) for i in chosen]
    pieces.append(last)
    if before:
      said = el("summary", f"{len(before)} earlier ", el("small", f"of {prompt!r}"))
      pieces.append(el("details", said, *before))
  return joined(pieces)


def _sample(event: dict[str, Any], prompt: str) -> Html:
  at = el("small", f"step {number(event.get('step'))}")
  return el("div", at, el("b", prompt), str(event.get("text")), class_="sample")


def data(run: Recorded) -> Html:
  """Where what it learned from came from."""
  rows = [["Digest", el("code", str(run.data["digest"]))]] if run.data.get("digest") else []
  rows += [["Kept out", str(event.get("found"))] for event in run.of("kept_out")[-1:]]
  rows += [
    [el("code", name), el("code", _value(value))]
    for name, value in run.config.items()
    if name == "data" or name.startswith("data.")
  ]
  pieces = [table([], rows)] if rows else []
  for folder, amounts in run.prepared.items():
    pieces.append(el("h3", f"Prepared by `bigtrain data prepare` in {folder}"))
    told = lambda of: ", ".join(f"{human(number)} {what}" for what, number in of.items())
    pieces.append(table([], [[name.capitalize(), told(of)] for name, of in amounts.items()]))
  return joined(pieces)


def environment(run: Recorded) -> Html:
  """Where the last start ran."""
  found = dict(run.environment)
  if isinstance(command := found.get("command"), list):
    found["command"] = shlex.join(map(str, command))
  if isinstance(devices := found.get("devices"), list):
    found["devices"] = " ".join(dict.fromkeys(map(str, devices)))
  if isinstance(packages := found.pop("packages", None), dict):
    found |= packages
  rows = [[name.capitalize() if name in run.environment else name, el("code", _value(value))]
          for name, value in found.items()]  # fmt: skip
  return table([], rows) if rows else Html("")


def config(run: Recorded) -> Html:
  """Every field, by the first word of its path."""
  groups: dict[str, list[list[Any]]] = {}
  for name, value in run.config.items():
    groups.setdefault(name.split(".")[0], []).append([el("code", name), el("code", _value(value))])
  single = [rows[0] for rows in groups.values() if len(rows) == 1]
  pieces = [table([], single)] if single else []
  for group, rows in groups.items():
    if len(rows) > 1:
      kind = run.config.get(group)
      told = el("summary", group, el("small", f" {_value(kind)}" if isinstance(kind, str) else ""))
      pieces.append(el("details", told, table([], rows)))
  return joined(pieces)


def _value(value: Any) -> str:
  """A value on one line."""
  if isinstance(value, bool) or value is None:
    return {True: "yes", False: "no", None: "–"}[value]
  if isinstance(value, int):
    return str(value)
  if isinstance(value, float):
    return number(value)
  if isinstance(value, list):
    return ", ".join(map(_value, value)) or "none"
  if isinstance(value, dict):
    return _fields(value)
  return str(value)
