"""Probes of real experiments for the field test: what a run computes and what it writes."""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import jax

from bigtrain import sharding
from bigtrain.config import Refused, dump
from bigtrain.data.sources import Files
from bigtrain.data.text import TextData
from bigtrain.experiment import Experiment
from bigtrain.mesh import Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.language_model import LanguageModelConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.objectives import CausalLM
from bigtrain.objectives.experts import with_experts
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Constant
from bigtrain.program import Program
from bigtrain.state import combine
from bigtrain.train import train
from tests.fields import Probe, batch_bytes, jaxpr


def remembered(*parts: str):
  """Of experiments that are equal in `parts`, which are all that it looks at, a probe sees one."""

  def remember(probe: Probe) -> Probe:
    seen: dict[str, str | bytes] = {}

    @functools.wraps(probe)
    def look(e: Experiment) -> str | bytes:
      whole = dump(e)
      key = json.dumps([whole.get(part) for part in parts])
      if key not in seen:
        seen[key] = probe(e)
      return seen[key]

    return look

  return remember


@remembered("data", "seed")
def batches(e: Experiment) -> bytes:
  """The bytes of a training batch, of one far into the run, and of held-out rows."""
  data = e.data.make(e.seed)
  parts = [data.batch(0, 4), data.batch(5_000, 4), data.eval_batch(0, 4)]
  return b"".join(map(batch_bytes, parts)) + str(data.eval_examples()).encode()


@remembered("model", "mesh", "seed")
def initialisation(e: Experiment) -> str:
  """The program that makes the parameters, and where on the mesh each of them lies."""
  with jax.set_mesh(e.mesh.make()):
    make = lambda: e.model.make(jax.random.key(e.seed))
    leaves = jax.tree.leaves(jax.eval_shape(make))
    return jaxpr(make) + str([x.sharding.shard_shape(x.shape) for x in leaves])


def loss(e: Experiment) -> str:
  """The program of the loss, on the experiment's mesh: it is traced sooner than a step."""
  objective = with_experts(e.objective)
  return _traced(e, lambda program: lambda s, batch: objective(_model(s), batch, program.key(0)))


def step(e: Experiment) -> str:
  """The program of the training step, on the experiment's mesh."""
  return _traced(e, lambda program: program.step)


def _model(state):
  return combine(state.model, state.variables)


def _traced(e: Experiment, function: Callable[[Program], Callable]) -> str:
  """The jaxpr of a function of a program's state and a batch."""
  mesh = e.mesh.make()
  with jax.set_mesh(mesh):
    program = Program(e, mesh)
    spec, place = e.data.make(e.seed).spec(e.batch), sharding.batch_sharding()
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for k, x in spec.items()}
    try:
      return jaxpr(function(program), program.abstract(), batch)
    except Refused as refusal:  # Such as of images that are none.
      return str(refusal)


def record(e: Experiment) -> str:
  """What a run of a few steps leaves behind: rows, events, files. The one probe that runs.

  Its model, data, objective and optimizer are tiny ones: the other probes see the experiment's.
  """
  block = BlockConfig(attention=AttentionConfig(heads=1), feed_forward=FeedForwardConfig(hidden=8))
  e.model = LanguageModelConfig(vocab=384, dim=8, layers=1, pattern=(block,))
  optimizer = AdamW(lr=1e-2, schedule=Constant(warmup=0))
  e.objective, e.optimizer, e.mesh, e.data = CausalLM(), optimizer, Mesh(), TextData()
  return _recorded(e)


@remembered(*(field.name for field in dataclasses.fields(Experiment)))
def _recorded(e: Experiment) -> str:
  with tempfile.TemporaryDirectory() as folder:
    text = pathlib.Path(folder) / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"It is {i} again."}) + "\n" for i in range(60)))
    e.data = TextData(source=Files(pattern=str(text), validation=0.5), seq=32)
    run_dir = pathlib.Path(folder) / "run"
    try:
      train(e, run_dir, quiet=True)
    except Refused as refusal:  # Such as of a run that is named and not there.
      return str(refusal)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    events = [event for event in events if event["event"] != "goodput"]  # Seconds alone.
    events.sort(key=lambda event: event["event"] == "verified")  # When, is a matter of speed.
    kept = [
      *sorted(p.name for p in run_dir.iterdir()),
      *sorted(os.listdir(run_dir / "checkpoints")),
    ]
  measured = ("second", "wait", "mfu", "/s", "per_second", "time", "goodput")
  # Sums of another order differ by their rounding.
  rounded = lambda v: float(f"{v:.4g}") if isinstance(v, float) else v
  steady = lambda row: {k: rounded(v) for k, v in row.items() if not any(m in k for m in measured)}
  return json.dumps([*map(steady, rows), *map(steady, events), kept])


@remembered("optimizer", "steps")
def update(e: Experiment) -> str:
  """The optimizer's initial state and update on two parameters, and the learning rate."""
  optimizer = e.optimizer.make(e.steps)
  parameters = {"matrix_DF": jax.ShapeDtypeStruct((4, 8), "float32")}
  parameters["bias_F"] = jax.ShapeDtypeStruct((8,), "float32")
  state = jax.eval_shape(optimizer.init, parameters)
  rate = e.optimizer.learning_rate(e.steps)
  step = jax.ShapeDtypeStruct((), "int32")
  return "".join(
    [
      jaxpr(optimizer.init, parameters),
      jaxpr(optimizer.update, parameters, state, parameters),
      jaxpr(rate, step),
    ]
  )


PROBES = {
  "update": update,
  "initialisation": initialisation,
  "loss": loss,
  "step": step,
  "batches": batches,
  "record": record,
}
