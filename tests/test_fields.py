"""Every field of every experiment is used: a second value of it changes what a run does."""

import copy
import inspect
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from bigtrain import load
from bigtrain.config import configs
from bigtrain.data.tokenizers import BPE
from bigtrain.experiment import Evaluation
from bigtrain.faults import Faults
from bigtrain.mesh import Mesh
from bigtrain.models.mlp import MLPConfig
from bigtrain.smoke import shrink
from bigtrain.validate import padded
from tests import toys
from tests.fields import FieldTest, changed, jaxpr, leaves, second_values
from tests.probes import PROBES

# The harness itself, over toys.


def toy_step(e):
  """The jaxpr of a toy step that leaves out momentum, and theta unless a block is rotary."""

  def step(x):
    x = jnp.tile(x, (e.batch, e.model.dim + e.model.vocab)) * e.optimizer.lr
    for attention in e.model.pattern * e.model.layers:
      x = x * attention.heads + (attention.kv_heads or 0)
      if isinstance(attention.position, toys.Rotary):
        x = jnp.sin(x / attention.position.theta)
    return getattr(jax.nn, e.model.activation)(x) * (1 if e.model.tied else 2)

  return jaxpr(step, jnp.ones(()))


def dead(e, **settings):
  return FieldTest({"step": toy_step, **settings.pop("probes", {})}, **settings).dead(e)


def dead_fields(e, **settings):
  return {line.split("(")[1].split(")")[0] for line in dead(e, **settings) if "(" in line}


def test_a_field_that_nothing_reads_is_found_and_one_that_is_read_is_not():
  found = dead_fields(toys.experiment(data=toys.Data(tokens=250)))
  assert {"Sgd.momentum", "Loss.z_loss", "Learned.length"} <= found
  used = {"Sgd.lr", "Model.dim", "Model.layers", "Model.vocab", "Model.activation", "Model.tied"}
  assert not found & (used | {"Attention.heads", "Attention.kv_heads", "Rotary.theta"})


def test_a_field_that_only_one_branch_reads_is_dead_in_the_other():
  both = toys.experiment()
  both.model.pattern = (toys.Attention(position=toys.Rotary(theta=5.0)),)
  assert "Rotary.theta" not in dead_fields(both)
  other = toys.experiment()
  other.model.position = toys.Rotary()  # The toy step looks at the blocks' positions only.
  assert any(line.startswith("model.position.theta (Rotary.theta)") for line in dead(other))


def test_a_field_is_found_dead_although_it_is_read_by_validation_and_by_printing():
  def printing(e):
    return "the same" if str(e) else ""

  assert "Sgd.momentum" in dead_fields(toys.experiment(), probes={"print": printing})


def test_any_probe_that_sees_a_field_is_enough():
  seen = {"schedule": lambda e: str(range(0, e.steps, e.evaluation.every or e.steps))}
  without, with_it = dead_fields(toys.experiment()), dead_fields(toys.experiment(), probes=seen)
  assert without - with_it == {"Experiment.steps", "Evaluation.every"}


def test_an_exemption_silences_a_dead_field_and_is_reported_when_the_field_is_used():
  exempt = {"Sgd.momentum": "no probe yet", "Sgd.lr": "wrongly exempt"}
  lines = dead(toys.experiment(), exempt=exempt)
  assert not any("Sgd.momentum" in line for line in lines)
  assert "optimizer.lr: exempt (wrongly exempt), but step sees it" in lines


def test_a_field_without_a_second_valid_value_is_reported_until_an_experiment_has_one():
  looks = FieldTest({"step": toy_step})
  looks.dead(toys.experiment())  # The vocabulary is the tokenizer's, a multiple of 128: no other.
  assert "model.vocab (Model.vocab): no second value" in " ".join(looks.untried.values())
  looks.dead(toys.experiment(data=toys.Data(tokens=250)))
  assert "Model.vocab" not in " ".join(looks.untried.values())


def test_a_probe_that_differs_between_equal_experiments_is_refused():
  counter = iter(range(100))
  with pytest.raises(AssertionError, match="between equals"):
    dead(toys.experiment(), probes={"random": lambda e: str(next(counter))})


def test_equal_places_of_several_experiments_are_looked_at_once():
  looks = FieldTest({"step": toy_step})
  assert looks.dead(toys.experiment()) and not looks.dead(toys.experiment())
  silu = toys.experiment(model=toys.Model(activation="silu"))
  silu.model.position = None  # Another branch of the same class is looked at anew.
  assert {line.split(" ")[0] for line in looks.dead(silu)} == {"model.dropout", "model.position"}


def test_a_constant_inside_the_program_is_part_of_its_jaxpr():
  table = lambda n: jaxpr(lambda x: x + jnp.asarray(n), jnp.ones(2))
  assert table([1.0, 2.0]) == table([1.0, 2.0]) != table([1.0, 3.0])


@pytest.mark.parametrize(
  ("value", "kind", "expected"),
  [
    (4, int, [8, 5, 2, 3, 1, 0]),
    (None, int | None, [1, 2, 4, 8]),
    (True, bool, [False]),
    (3, int | None, [6, 4, 1, 2, 0, None]),
    ((), tuple[str, ...], [("x",)]),
    ((), tuple[tuple[int, int], ...], [((1, 1),)]),
    ((), tuple[Literal["a", "b"], ...], [("a",), ("b",)]),
    (None, toys.Rotary | toys.Learned | None, [toys.Rotary(), toys.Learned()]),
  ],
)
def test_second_values_differ_and_fit_the_annotation(value, kind, expected):
  assert list(second_values(value, kind)) == expected


def test_changing_a_leaf_leaves_the_original_alone():
  e = toys.experiment()
  other = changed(e, "model.pattern.1.position.theta", 3.0)
  assert other.model.pattern[1].position.theta == 3.0
  assert e == toys.experiment() and other != e


def test_every_leaf_is_listed():
  paths = {leaf.path for leaf in leaves(toys.experiment(evaluation=Evaluation(prompts=("a",))))}
  assert {
    "steps",
    "model.pattern.1.position.theta",
    "model.pattern.0.position",
    "mesh.fsdp",
  } <= paths
  assert {"evaluation.prompts", "batch_stages", "model.dropout"} <= paths
  assert "model.pattern" not in paths and "model" not in paths


# The experiments themselves.

EXPERIMENTS = sorted((pathlib.Path(__file__).parent.parent / "experiments").glob("*.py"))
# Second values where the generic ones would be invalid or too large to matter for a tiny model, and
# of what model and data must agree in.
VALUES = {
  "Adafactor.rates": ((("_", 0.5),),),
  "Adam.rates": ((("_", 0.5),),),
  "AdamW.rates": ((("_", 0.5),),),
  "BPE.special": (lambda e: (*e.data.tokenizer.special, "[NEW]"),),
  "CausalLM.loss_chunk": (32, None),
  "Checkpoints.keep_every": (1,),
  "Experiment.batch_stages": (((1, 64),),),
  "EncoderConfig.first": (lambda e: e.model.encoder.pattern[:1],),
  "EncoderConfig.unroll": (1, 2),
  "EncoderDecoderConfig.first": (lambda e: e.model.pattern[:1],),
  "EncoderDecoderConfig.unroll": (1, 2),
  "LabelledText.cls": ("[SEP]",),
  "LabelledText.sep": ("[CLS]",),
  "ImageData.channels": (3,),
  "ImageData.size": (35,),
  "LanguageModelConfig.first": (lambda e: e.model.pattern[:1],),
  "LanguageModelConfig.unroll": (1, 2),
  "Logging.layers_every": (1,),
  "MLPConfig.classes": (7,),
  "MLPConfig.inputs": (50,),
  "MaskedLM.loss_chunk": (32, None),
  "MaskedText.cls": ("[SEP]",),
  "MaskedText.mask": ("[SEP]",),
  "MaskedText.sep": ("[MASK]",),
  "Muon.rates": ((("_", 0.5),),),
  "Muon.spared": ("matrix",),
  "SpanCorruption.loss_chunk": (32, None),
  "Synthetic.classes": (7,),
  "Synthetic.features": (50,),
  "TextClassifierConfig.classes": (7,),
  "ViTConfig.channels": (3,),
  "ViTConfig.classes": (7,),
  "ViTConfig.first": (lambda e: e.model.pattern[:1],),
  "ViTConfig.image": (56,),
  "ViTConfig.unroll": (1, 2),
}
# Which probe is likely to see the fields of an object.
FIRST = {"data": "batches", "evaluation": "record", "checkpoints": "record", "logging": "record"}
# Why no probe can see a field.
STAGES = "how stages work together, and no mesh here has any; parallel/test_pipeline.py has it"
EXEMPT = {
  "Pipeline.microbatches": STAGES,
  "Pipeline.rounds": STAGES,
  "Pipeline.keep": STAGES,
  "Experiment.epochs": "stands in place of steps, which shrinking sets; test_train_step.py has it",
  "Experiment.new_weights": "parts of a model that weights_from fills; test_weights.py has it",
  "Mesh.sequence": "refused where tensor spans one device; tests/parallel has it",
  "Mesh.ulysses": "refused where context spans one device; tests/parallel has it",
  "Checkpoints.within": "how long a save may take; test_checkpoint_proofs.py has it",
  "Faults.back": "how far the host rolls back behind a fault; test_fault_policies.py has it",
  "Faults.examine": "of how many faults the host looks for the cause; test_incidents.py has it",
  "Faults.self_check": "what is right passes unseen; test_self_check.py has what is wrong",
  "Evaluation.batch": "every example counts once, whatever the batch: only memory and speed differ",
}
# What a model has no use for, and why.
UNUSED = {MLPConfig: {"FanIn.residual": "a plain dense network has no residual branch to scale"}}
# Why a leaf has one valid value only.
ONE_VALUE = {
  "model.encoder.offload": "where remat is none, nothing is kept by name",
  "model.encoder.recompute": "the same",
  "model.recompute": "the same",
  "model.offload": "the same",
  "optimizer.moments": "Adafactor keeps none",
  "products.format": "gradients' format must change with it; test_quantized.py has both",
  "model.encoder.pattern.0.attention.causal": "an encoder refuses causal attention",
  "model.pattern.0.attention.causal": "vision transformers and encoder-decoders refuse it too",
}


def small(function, **mesh):
  """A study small enough to trace and run, with batch and vocabulary that every mesh divides."""
  e = shrink(function())
  if any(letter == "E" for letter, _ in e.model.dims().values()):
    mesh["expert"] = 2  # How tokens travel shows only where there is a way to go.
  e.batch, e.evaluation.batch, e.mesh = 32, 32, Mesh(**mesh)
  # Every interval, limit and exemption from weight decay comes to bear in these steps.
  e.faults = Faults(policy="lower_rate", spike=8.0)  # So all that the step decides by is in it.
  e.steps, e.evaluation.every, e.evaluation.prompts = 5, 2, ("It",)
  e.checkpoints.every, e.checkpoints.keep, e.logging.every = 1, 2, 1
  e.optimizer.weight_decay = e.optimizer.weight_decay or 0.1
  if isinstance(tokenizer := getattr(e.data, "tokenizer", None), BPE):
    tokenizer.vocab = 300  # The model's, the next multiple of 128, has room for a second value.
  if (tokens := e.data.vocabulary()) is not None:
    for _, node in configs(e.model):
      if hasattr(node, "vocab"):
        node.vocab = padded(tokens)
  return e


@pytest.mark.parametrize("name", PROBES)
def test_equal_experiments_are_equal_to_a_probe_that_remembers_none(name):
  probe = inspect.unwrap(PROBES[name])
  e = small(load.functions(EXPERIMENTS[0].parent / "quickstart.py")["base"])
  assert probe(copy.deepcopy(e)) == probe(copy.deepcopy(e))


def test_every_field_of_every_experiment_changes_what_a_run_does():
  looks = FieldTest(PROBES, VALUES, EXEMPT, FIRST, devices=8)
  dead = []
  for path in EXPERIMENTS:
    for name, function in load.functions(path).items():
      e = small(function)
      lines = [f"{path.name}:{name} {line}" for line in looks.dead(e)]
      unused = UNUSED.get(type(e.model), {})
      dead += [line for line in lines if not any(f"({field})" in line for field in unused)]
      dead += looks.dead(small(function, data=-1, fsdp=1))
  assert not dead, "\n".join(dead)
  untried = [line for line in looks.untried.values() if line.split(" ")[0] not in ONE_VALUE]
  assert not untried, "\n".join(untried)
  assert set(EXEMPT) <= looks.fields, "an exemption for a field that no experiment has"
