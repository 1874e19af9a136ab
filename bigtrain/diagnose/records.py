"""What checks look at: a run's records, and the few measures of a series that several of them take.

A series has one entry for each row; what was not recorded in a row is NaN.
"""

import collections
import os
import re
from typing import Literal, NamedTuple

import numpy as np

from bigtrain.columns import Columns, columns
from bigtrain.config import Refused
from bigtrain.run_directory import RunDirectory


class Finding(NamedTuple):
  """One thing that is wrong."""

  kind: str  # Such as "vanishing gradients".
  evidence: str  # Where, and the numbers.
  remedy: str
  # Of a `trouble` the model becomes worse; heeding `advice` saves time, or spares one later.
  severity: Literal["trouble", "advice"] = "trouble"
  explains: tuple[str, ...] = ()  # Kinds of findings that follow from this one.

  def __str__(self) -> str:
    return f"{self.kind}: {self.evidence}. {self.remedy}."


class Records(NamedTuple):
  """What a run wrote."""

  train: Columns
  evaluations: Columns
  layers: Columns
  events: list[dict]

  def of(self, statistic: str) -> dict[str, np.ndarray]:
    """A statistic's series by layer."""
    start = f"{statistic}/"
    return {
      name.removeprefix(start): v for name, v in self.layers.items() if name.startswith(start)
    }

  def by_depth(self, statistic: str) -> dict[str, dict[str, float]]:
    """{stack: {layer: its late value}} in order of depth; the parts of a layer are one."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for name, values in self.of(statistic).items():
      if match := re.match(r"(.*?\b)(\d+)(\.|$)", name):
        found[match[1]][match[2]].append(late(values))
    return {
      stack: {
        f"{stack}{at}": float(np.sqrt(np.mean(np.square(by[at])))) for at in sorted(by, key=int)
      }
      for stack, by in found.items()
    }

  def losses(self) -> np.ndarray | None:
    """The training loss, where there are rows enough to tell its course, all of them finite."""
    loss = self.train.get("loss")
    return None if loss is None or len(loss) < 20 or not np.isfinite(loss).all() else loss


def read(run_dir: str | os.PathLike) -> Records:
  """The records of a run, which may still be going on.

  Raises:
    Refused: there is no such directory, or nothing is recorded in it yet.
  """
  directory = RunDirectory(run_dir, writes=False)
  rows, evaluations, layers = (directory.rows(k) for k in ("train", "eval", "layers"))
  # A step whose batch was padding alone has learned nothing and has no loss.
  train = columns([row for row in rows if row.get("weight") != 0])
  evaluations, layers = columns(evaluations), columns(layers)
  if not train:
    if not directory.path.exists():
      raise Refused(f"there is no directory {run_dir}; `bigtrain train` says where a run is")
    if not (events := directory.events()):
      raise Refused(f"{run_dir} has no metrics.jsonl: nothing was trained there")
    raise Refused(
      f"{run_dir} has not logged a step yet; the last that is known of it is "
      f"{events[-1].get('error') or events[-1]['event']!r}"
    )
  return Records(train, evaluations, layers, directory.events())


class Course(NamedTuple):
  """The course of a loss, in its own unit, robust to single values."""

  start: float
  highest: float
  best: float
  end: float
  noise: float  # Standard deviation of a row.

  @property
  def fall(self) -> float:
    """How much was learned at best: the scale on which a rise is large or small."""
    return self.start - self.best


def course(loss: np.ndarray) -> Course:
  """The median of the first and of the last tenth, and such medians in between."""
  width = max(len(loss) // 10, 3)
  windows = np.lib.stride_tricks.sliding_window_view(loss, width)
  # Of a long run some 500 of them: neighbours hold nearly the same rows.
  at = np.r_[0 : len(windows) - 1 : max(width // 50, 1), len(windows) - 1]
  medians = np.median(windows[at], axis=1)
  differences = np.diff(loss)
  spread = np.median(np.abs(differences - np.median(differences)))
  return Course(medians[0], medians.max(), medians.min(), medians[-1], 1.4826 * spread / np.sqrt(2))


def late(values: np.ndarray) -> float:
  """The median of the second half, where a run has come to its own; NaN if nothing is recorded."""
  half = values[len(values) // 2 :]
  return float(np.nanmedian(half)) if np.isfinite(half).any() else np.nan
