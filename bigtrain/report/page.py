"""The page: sections in their order, each of what the runs recorded."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bigtrain.goodput import Attempt
from bigtrain.report import charts, parts
from bigtrain.report.elements import Html, el, joined, number, span, table
from bigtrain.report.records import Recorded

# No script, nothing from elsewhere: neither by mistake nor by what a document brings along.
POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
  "form-action 'none'"
)
OUTCOMES = {
  "end": ("done", "good"),
  "left": ("left on a signal", ""),
  "error": ("failed", "bad"),
  "killed": ("no end recorded", "bad"),
  "running": ("running", ""),
  "none": ("never started", "bad"),
}
FRESH = 300  # Seconds since the last sign of life of a run that counts as running.


def page(runs: Sequence[Recorded], names: Sequence[str]) -> str:
  """The report of one run, or of several beside each other."""
  of_all = lambda make: joined(make(runs, names))
  sections = [
    ("findings", "Findings", _each(runs, names, parts.findings)),
    ("differences", "What differs", parts.differences(runs, names)),
    ("training", "Training", of_all(charts.training)),
    ("optimizer", "Optimizer", of_all(_optimizer)),
    ("speed", "Speed", of_all(_speed)),
    ("time", "Time", _each(runs, names, parts.times)),
    ("layers", "Layers", _each(runs, names, lambda run: _grid(charts.layers(run)))),
    ("incidents", "Incidents", _each(runs, names, parts.incidents)),
    ("samples", "Samples", _each(runs, names, parts.samples)),
    ("data", "Data", _each(runs, names, parts.data)),
    ("environment", "Environment", _each(runs, names, parts.environment)),
    ("config", "Config", _each(runs, names, parts.config)),
  ]
  shown = [(anchor, title, inside) for anchor, title, inside in sections if inside]
  title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
  grids = ("training", "optimizer", "speed")
  body = [
    el(
      "header",
      el("h1", title, *(_state(run) for run in runs if len(runs) == 1)),
      *(el("p", _lead(run), class_="lead") for run in runs if len(runs) == 1),
      el("nav", *(el("a", title, href=f"#{anchor}") for anchor, title, _ in shown)),
    ),
    _facts(runs[0]) if len(runs) == 1 else _beside(runs, names),
    *(
      el("section", el("h2", title, id=anchor), _grid([inside]) if anchor in grids else inside)
      for anchor, title, inside in shown
    ),
    el("footer", _footer(runs)),
  ]
  head = [
    el("meta", charset="utf-8"),
    el("meta", http_equiv="Content-Security-Policy", content=POLICY),
    el("meta", name="viewport", content="width=device-width, initial-scale=1"),
    el("meta", name="color-scheme", content="light dark"),
    el("title", f"{title} · bigtrain"),
    el("style", Html(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))),
  ]
  return f"<!doctype html>\n{el('html', el('head', *head), el('body', *body), lang='en')}\n"


def _each(runs: Sequence[Recorded], names: Sequence[str], make: Callable[[Recorded], Html]) -> Html:
  """What is made of each run, under its name where there are several."""
  made = [(name, make(run)) for run, name in zip(runs, names, strict=True)]
  made = [(name, inside) for name, inside in made if inside]
  if len(runs) == 1:
    return joined(inside for _, inside in made)
  return joined(joined([el("h3", name), inside]) for name, inside in made)


def _grid(cards) -> Html:
  inside = joined(cards)
  return el("div", inside, class_="charts") if inside else inside


def _optimizer(runs: Sequence[Recorded], names: Sequence[str]) -> Iterator[Html]:
  return charts.columns_of(runs, names, charts.OPTIMIZER)


def _speed(runs: Sequence[Recorded], names: Sequence[str]) -> Iterator[Html]:
  return charts.columns_of(runs, names, charts.SPEED)


def outcome(run: Recorded) -> str:
  attempts = run.account.attempts
  if not attempts:
    return "none"
  last: Attempt = attempts[-1]
  running = last.outcome == "killed" and time.time() - last.ended < FRESH
  return "running" if running else last.outcome


def _state(run: Recorded) -> Html:
  said, kind = OUTCOMES[outcome(run)]
  return el("span", said, class_=f"state {kind}".strip())


def _lead(run: Recorded) -> str:
  attempts = run.account.attempts
  said = [run.path]
  if attempts:
    day = lambda t: time.strftime("%Y-%m-%d %H:%M", time.gmtime(t))
    said.append(f"{day(attempts[0].began)} to {day(attempts[-1].ended)} UTC")
  if error := (run.of("error") if outcome(run) == "error" else []):
    said.append(str(error[-1].get("error")))
  return " · ".join(said)


def _measures(run: Recorded) -> dict[str, str]:
  """The few numbers that tell most."""
  train, evaluations, spent = run.train, run.evaluations, run.account
  found = {}
  if train:
    steps = run.config.get("steps")
    of = f"/{steps:,}" if isinstance(steps, int) else ""
    found["Step"] = f"{int(train['step'].max()):,}{of}"
  if "loss" in train:
    found["Training loss"] = number(_last(train["loss"]))
  for name, values in evaluations.items():
    if name.endswith("/loss"):
      found[f"{name.split('/')[1].capitalize()} loss"] = number(_last(values))
  if spent.attempts:
    found["Wall time"] = span(spent.wall)
    found["Goodput"] = f"{spent.goodput:.1%}"
    found["Starts"] = f"{len(spent.attempts):,}"
  for name, unit in (("tokens_per_second", "Tokens/s"), ("examples_per_second", "Examples/s")):
    if name in train:
      found[unit] = f"{np.nanmedian(train[name]):,.0f}"
  if "mfu" in train:
    found["MFU"] = f"{np.nanmedian(train['mfu']):.1%}"
  if run.met:
    found["Incidents"] = f"{run.met:,}"
  return found


def _last(values: np.ndarray) -> float | None:
  finite = values[np.isfinite(values)]
  return float(finite[-1]) if len(finite) else None


def _facts(run: Recorded) -> Html:
  facts = (el("div", el("small", k), el("b", v), class_="fact") for k, v in _measures(run).items())
  return el("div", *facts, class_="facts")


def _beside(runs: Sequence[Recorded], names: Sequence[str]) -> Html:
  """The measures of several runs, each in a row."""
  found = [_measures(run) for run in runs]
  columns = list(dict.fromkeys(name for of in found for name in of))
  dot = lambda i: el("i", class_="dot", style=f"background:var(--c{i % 8})")
  rows = [
    [joined([dot(i), names[i], _state(runs[i])]), *(of.get(column, "–") for column in columns)]
    for i, of in enumerate(found)
  ]
  return el(
    "section", table(["Run", *columns], rows, numbers=range(1, len(columns) + 1), kind="stack")
  )


def _footer(runs: Sequence[Recorded]) -> str:
  revisions = {str(run.environment.get("revision")) for run in runs} - {"None"}
  versions = {
    str(packages.get("bigtrain"))
    for run in runs
    if isinstance(packages := run.environment.get("packages"), dict)
  }
  return (
    f"Made from records of bigtrain {', '.join(sorted(versions)) or 'of an unknown version'}"
    + (f" at revision {', '.join(sorted(revisions))}" if revisions else "")
    + ". This file is complete in itself: it loads nothing and runs no script."
  )
