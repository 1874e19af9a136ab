"""Whole files of a run and of those who start one, and what reads them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import runs


def make_config(folder: Path) -> list[Path]:
  from bigtrain import load

  load.write(runs.base(), folder)
  return [folder / "config.json"]


def read_config(folder: Path) -> Any:
  from bigtrain import load
  from bigtrain.validate import validate

  experiment, _ = load.read(folder)
  validate(experiment)


def make_records(folder: Path) -> list[Path]:
  """A run's records, as the run left in peace has them."""
  names = ("metrics.jsonl", "events.jsonl", "environment.json", "data.json")
  rows = [{"step": i, "kind": k, "time": 1e9 + i, "loss": 1.0, "step_seconds": 0.1}
          for i in range(1, 9) for k in ("train", "eval", "layers")]  # fmt: skip
  events = [
    {"time": 1e9, "event": "start", "processes": 1, "devices": 1, "mesh": {}, "microbatches": 1},
    {"time": 1e9 + 1, "event": "compile", "shapes": {"tokens": [8, 64]}, "seconds": 0.5},
    {"time": 1e9 + 2, "event": "save", "step": 4, "seconds": 0.1},
    {"time": 1e9 + 3, "event": "verified", "step": 4, "arrays": 3, "seconds": 0.1},
    {"time": 1e9 + 4, "event": "start", "processes": 1, "devices": 1, "mesh": {}},
    {"time": 1e9 + 5, "event": "restore", "seconds": 0.1},
    {"time": 1e9 + 6, "event": "resume", "step": 4, "lost_steps": 2, "lost_seconds": 1.0},
    {"time": 1e9 + 7, "event": "goodput", "goodput": 0.5, "wall": 7.0, "of": {"compute": 3.5}},
    {"time": 1e9 + 8, "event": "hang", "phase": "step", "seconds": 8.0, "missing": [1]},
    {"time": 1e9 + 8, "event": "straggler", "process": 1, "seconds": 8.0, "why": "x"},
    {"time": 1e9 + 8, "event": "incident", "step": 3, "kind": "spike", "cause": "data"},
    {"time": 1e9 + 8, "event": "rollback", "step": 3, "to": 2, "example": 9},
    {"time": 1e9 + 9, "event": "end"},
  ]
  lines = lambda records: "".join(json.dumps(r) + "\n" for r in records)
  texts = (lines(rows), lines(events), '{"command": ["x"], "devices": [1, "cpu", "cpu"]}', "{}")
  for name, text in zip(names, texts, strict=True):
    (folder / name).write_text(text)
  return [folder / name for name in names]


def read_records(folder: Path) -> Any:
  """As a start of the run reads them, and then the report."""
  from bigtrain import elastic, goodput
  from bigtrain.report.page import page
  from bigtrain.report.records import read
  from bigtrain.run_directory import RunDirectory

  directory = RunDirectory(folder)
  elastic.fitted(runs.base(), directory.events())
  goodput.resume(directory, 4)
  goodput.of(directory)
  directory.close()
  return page([read(folder)], ["run"]).encode()  # As it is written: what is not text shows here.


def make_checkpoint(folder: Path) -> list[Path]:
  from bigtrain.checkpoint import Store
  from bigtrain.experiment import Checkpoints
  from bigtrain.run_directory import RunDirectory
  from tests import toys
  from tools.faults.saving import tree

  with Store(RunDirectory(folder).checkpoints, Checkpoints()) as store:
    store.save(3, tree(3), toys.experiment())
    store.keep_next(3, {"loss": 1.0, "gradient_norm": 1.0, "data_digest": 1.0, "where": {}})
  return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def read_checkpoint(folder: Path) -> Any:
  import jax

  from bigtrain.run_directory import RunDirectory
  from bigtrain.saved import Saved
  from tools.faults.saving import tree

  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
  saved = Saved(RunDirectory(folder).checkpoints)
  found = saved.restore(3, like) if 3 in saved.steps() else None
  saved.next_step(3)
  if found is not None and any(
    not np.array_equal(value, tree(3)[name]) for name, value in found.items()
  ):
    raise AssertionError("what was restored is not what was saved")


def make_weights(folder: Path) -> list[Path]:
  from safetensors.numpy import save_file

  rng = np.random.default_rng(0)
  save_file(
    {f"model.layers.{i}.w": rng.normal(size=(4, 3)).astype(np.float32) for i in range(4)},
    folder / "w.safetensors",
  )
  return [folder / "w.safetensors"]


def read_weights(folder: Path) -> Any:
  from bigtrain.interop import huggingface

  return huggingface.read(folder / "w.safetensors")


def make_arguments(folder: Path) -> list[Path]:
  words = ["--steps", "30", "--optimizer.lr", "1e-3", "--model.dim", "64", "--quiet",
           "--data.source.pattern", "x", "--logging.no_tensorboard", "--optimizer.schedule.warmup",
           "5", "--faults.policy", "skip", "--checkpoints.keep_every", "None"]  # fmt: skip
  (folder / "arguments").write_text("\n".join(words))
  return [folder / "arguments"]


def read_arguments(folder: Path) -> Any:
  from bigtrain.cli import override

  words = (folder / "arguments").read_bytes().decode(errors="surrogateescape").split("\n")
  with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):  # --help.
    override(runs.base(), words, "bigtrain train")
