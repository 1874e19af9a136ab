"""Which charts a report has, and what is drawn in them."""

from collections.abc import Iterator, Sequence

import numpy as np

from bigtrain.columns import Columns
from bigtrain.report.bands import bands
from bigtrain.report.elements import Html, el, joined, span
from bigtrain.report.figures import Curve, Look, chart, heat
from bigtrain.report.records import Recorded
from bigtrain.report.svg import SERIES

SPEED = {
  "tokens_per_second": ("Tokens a second", Look(zero=True)),
  "examples_per_second": ("Examples a second", Look(zero=True)),
  "mfu": ("MFU", Look(percent=True, zero=True)),
  "step_seconds": ("Seconds a step", Look(zero=True)),
  "input_wait_seconds": ("Seconds waited a step", Look(zero=True)),
  "goodput": ("Goodput so far", Look(percent=True, zero=True)),
}
OPTIMIZER = {
  "learning_rate": ("Learning rate", Look(zero=True)),
  "gradient_norm": ("Gradient norm", Look(log=True)),
}
# Beside the loss itself, which has a chart, or of no use as a curve.
NOT_DRAWN = {
  "step", "time", "loss", "loss_max", "weight", "data_digest", "skipped", "model_flops_per_second",
  *SPEED, *OPTIMIZER,
}  # fmt: skip
STATISTICS = {
  "gradient": "Gradients by layer",
  "update": "Updates by layer, relative to their parameters",
  "output": "Activations by layer",
}
KINDS = {
  "compute": "k0",
  "input wait": "k1",
  "compile": "k2",
  "checkpoint": "k3",
  "evaluation": "k4",
  "restore": "k5",
  "start-up": "k6",
  "lost work": "k7",
  "idle": "k8",
  "other": "k9",
}
BINS = {"wide": (1200, 160), "narrow": (360, 80)}  # Pixels, stretches of time.


def card(title: str, picture: Html, key: Sequence[tuple[str, str]] = ()) -> Html:
  """A chart with its title, and the names of its colours."""
  swatch = lambda color: el("i", style=f"background:var(--{color})")
  legend = [el("span", swatch(color), name) for name, color in key]
  return el(
    "figure",
    el("figcaption", el("b", title), el("span", *legend, class_="key") if legend else ""),
    picture,
  )


def training(runs: Sequence[Recorded], names: Sequence[str]) -> Iterator[Html]:
  """The loss and every other metric, of training and held out."""
  yield from _metric(runs, names, "loss", "Loss", Look())
  for metric in _metrics(runs):
    share = metric.split("/")[-1] in ("accuracy", "mfu") or metric.endswith("_accuracy")
    title = metric.replace("_", " ").capitalize()
    yield from _metric(runs, names, metric, title, Look(percent=share))


def _metrics(runs: Sequence[Recorded]) -> list[str]:
  """Names of metrics but the loss, those that are evaluated first."""
  evaluated = {n.split("/", 2)[-1]: 0 for run in runs for n in run.evaluations if "/" in n}
  trained = {name: 0 for run in runs for name in run.train}
  return [name for name in evaluated | trained if name not in NOT_DRAWN]


def _metric(runs, names, metric: str, title: str, look: Look) -> Iterator[Html]:
  """One run has a colour for training and one for held out; of several, each run has one."""
  curves, key, alone = [], [], len(runs) == 1
  for i, run in enumerate(runs):
    color = SERIES[i % len(SERIES)]
    prefix = "" if alone else f"{names[i]} "
    if (values := run.train.get(metric)) is not None and np.isfinite(values).any():
      name = f"{prefix}training"
      curves.append(Curve(name, run.train["step"], values, color, smooth=True))
      key.append((name, f"c{i % len(SERIES)}"))
    for column, values in run.evaluations.items():
      if column.split("/", 2)[-1] != metric or "/" not in column or not np.isfinite(values).any():
        continue
      split = column.split("/")[1]
      name, j = f"{prefix}{split}", (1 if alone else i) % len(SERIES)
      curves.append(Curve(name, run.evaluations["step"], values, SERIES[j], marks=True))
      key.append((name, f"c{j}"))
  if curves:
    shown = key if alone else [(n, f"c{i % len(SERIES)}") for i, n in enumerate(names)]
    note = "" if alone else " (points: held out)" * any(c.marks for c in curves)
    events = marks(runs[0]) if alone else ()
    yield card(f"{title}{note}", chart(curves, look, last(runs), title, events=events), shown)


def last(runs: Sequence[Recorded]) -> float:
  """The last step that any of them recorded."""
  return max([1.0, *(float(run.train["step"].max()) for run in runs if run.train)])


def marks(run: Recorded) -> list[tuple[float, str]]:
  """Steps at which something went wrong, and what."""
  found = [(i.about["step"], f"incident: {i.about.get('kind')}") for i in run.incidents
           if isinstance(i.about.get("step"), int)]  # fmt: skip
  return found + [(e["step"], "rolled back from here") for e in run.of("rollback") if "step" in e]


def columns_of(runs, names, table: dict[str, tuple[str, Look]]) -> Iterator[Html]:
  """A chart for each of these columns that some run has."""
  for column, (title, look) in table.items():
    curves, key = [], []
    for i, run in enumerate(runs):
      values = run.train.get(column)
      if values is None or not np.isfinite(values).any():
        continue
      smooth = column not in ("learning_rate", "goodput")
      color = SERIES[i % len(SERIES)]
      curves.append(Curve(names[i], run.train["step"], values, color, smooth=smooth))
      key.append((names[i], f"c{i % len(SERIES)}"))
    if len(runs) == 1:
      curves, key = [c._replace(name=title.lower()) for c in curves], []
    if curves:
      yield card(title, chart(curves, look, last(runs), title), key)


def layers(run: Recorded) -> Iterator[Html]:
  """Each statistic of all layers over the steps."""
  for statistic, title in STATISTICS.items():
    of = _of(run.layers, statistic)
    if statistic == "update":
      sizes = _of(run.layers, "parameter")
      of = {name: v / np.maximum(sizes[name], 1e-30) for name, v in of.items() if name in sizes}
    if of and any((values > 0).any() for values in of.values()):
      values = np.stack(list(of.values()))
      yield card(title, heat(list(of), run.layers["step"], values, title))


def _of(layers: Columns, statistic: str) -> dict[str, np.ndarray]:
  start = f"{statistic}/"
  return {n.removeprefix(start): v for n, v in layers.items() if n.startswith(start)}


def time_line(run: Recorded) -> Html:
  """What the time went to, from the first start on."""
  account = run.account
  if not account.stretches:
    return Html("")
  began, whole = account.stretches[0].began, max(account.wall, 1e-3)
  notes = [(a.began - began, str(i), f"start {i}") for i, a in enumerate(account.attempts, 1)]
  for event in run.events:
    if event["event"] in ("incident", "rollback", "hang", "damaged"):
      notes.append((event["time"] - began, "▼", f"{event['event']} {_brief(event)}".strip()))
  notes = sorted(n for n in notes if 0 <= n[0] <= whole)
  pictures = []
  for kind, (width, bins) in BINS.items():
    edges = np.linspace(0, whole, bins + 1)
    shares = {name: share for name, share in _shares(run, began, edges).items() if share.any()}
    picture = bands(edges, shares, KINDS, width, notes, span, "What the time went to")
    pictures.append(el("div", picture, class_=kind))
  return el("figure", *pictures, class_="line")


def _brief(event: dict) -> str:
  return ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event"))[:200]


def _shares(run: Recorded, began: float, edges: np.ndarray) -> dict[str, np.ndarray]:
  """Of each stretch between the edges, the share of each kind."""
  sums = {kind: np.zeros(len(edges)) for kind in KINDS}
  for kind, first, last in run.account.stretches:
    # How much of it lies before each edge.
    sums[kind] += np.clip(edges - (first - began), 0, last - first)
  return {kind: np.diff(total) / np.diff(edges) for kind, total in sums.items()}


def split_bar(seconds: dict[str, float]) -> Html:
  """The split of the wall time as one bar."""
  whole = sum(seconds.values()) or 1.0
  parts = (
    el("i", style=f"width:{100 * s / whole:.3f}%;background:var(--{KINDS[kind]})",
       title=f"{kind}: {span(s)}, {s / whole:.1%}")
    for kind, s in seconds.items() if s
  )  # fmt: skip
  return el("div", joined(parts), class_="bar")
