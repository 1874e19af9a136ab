"""Meshes that cannot cut an experiment's rows are refused before any device work."""

import dataclasses

import pytest

from bigtrain.config import Refused
from bigtrain.mesh import Mesh
from bigtrain.validate import validate
from tests import classes, packed
from tests.classes import MODELS
from tests.objectives import test_masked_lm
from tests.parallel import test_parity_context

CALM = {"dropout": 0.0}  # Of attention.
FEW = {"dropout": 0.0, "kv_heads": 4}
MESHES = (Mesh(fsdp=2, context=2, tensor=2, sequence=True), Mesh(fsdp=1, context=8))


def decoder(seq=16, attention=CALM, **fields):
  return packed.experiment(data=packed.Packed(seq=seq), attention=attention, **fields)


@pytest.mark.parametrize(
  ("e", "expected"),
  [
    (
      decoder(seq=20, mesh=Mesh(data=2, fsdp=1, context=4)),
      "rows of 20 tokens cannot be cut over the mesh (context=4, sequence=1), which takes "
      "multiples of 8, two pieces a device; use 16 or 24 tokens",
    ),
    (
      decoder(seq=17, mesh=Mesh(fsdp=4, tensor=2, sequence=True)),
      "(context=1, sequence=2), which takes multiples of 2; use 16 or 18 tokens",
    ),
    (
      decoder(seq=6, mesh=Mesh(fsdp=1, context=4, tensor=2, ulysses=True, sequence=True)),
      "(context=4, sequence=2), which takes multiples of 8; use 8 tokens",
    ),
    (
      decoder(attention={}, mesh=Mesh(fsdp=4, context=2)),
      "attention.dropout is 0.1, but over mesh.context attention does not drop weights; set it to",
    ),
    (
      decoder(attention=FEW, mesh=Mesh(fsdp=1, context=2, tensor=4, ulysses=True)),
      "attention.kv_heads 4 is not divisible by 8, the mesh's context=2, tensor=4; use 8",
    ),
    (
      test_parity_context.t5(mesh=Mesh(fsdp=1, context=8)),
      "relative biases go by the columns of whole rows, of which each device has pieces in a ring; "
      "set experiment.mesh.ulysses = True, or experiment.mesh.context = 1",
    ),
    (
      decoder(mesh=Mesh(sequence=True)),
      "mesh.sequence is a way to use mesh.tensor, which spans one device; set "
      "experiment.mesh.tensor = 2 or more, or experiment.mesh.sequence = False",
    ),
    (
      decoder(mesh=Mesh(ulysses=True)),
      "mesh.ulysses is a way to use mesh.context, which spans",
    ),
    (
      classes.experiment(MODELS["vit"], mesh=Mesh(fsdp=4, context=2)),
      "cuts rows of tokens (context), but the data has none; set experiment.mesh.context = 1",
    ),
    (
      classes.experiment(MODELS["mlp"], mesh=Mesh(fsdp=4, tensor=2, sequence=True)),
      "cuts rows of tokens (sequence), but the data has none",
    ),
    (
      dataclasses.replace(decoder(mesh=Mesh(fsdp=4, context=2)), model=MODELS["mlp"]),
      "cuts rows of tokens (context), but a MLPConfig takes them whole",
    ),
  ],
)
def test_a_mesh_that_cannot_cut_these_rows_is_refused(e, expected):
  with pytest.raises(Refused) as refusal:
    validate(e, devices=8)
  assert expected in str(refusal.value)


@pytest.mark.parametrize(
  "mesh", [Mesh(fsdp=2, context=2, tensor=2, sequence=True), Mesh(context=8)]
)
def test_a_mesh_that_can_is_not(mesh):
  validate(decoder(mesh=mesh), devices=8)
  validate(test_masked_lm.experiment(seq=16, mesh=mesh), devices=8)
