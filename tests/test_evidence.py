"""What is kept of a batch: the worst rows first, as arrays, as text and as pictures."""

import contextlib
import io

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from bigtrain import checks, evidence, examine, sharding
from bigtrain.checks import Check, Checked
from bigtrain.data.feed import put
from bigtrain.data.tokenizers import Bytes
from bigtrain.experiment import Experiment
from bigtrain.mesh import Mesh
from bigtrain.program import Program
from tests import faulty, packed, runs

TOKENIZER = Bytes().make("", lambda: [], None)


def batch_of(texts, seq=16):
  """Rows of the documents of each tuple."""
  tokens, segments = np.zeros((2, len(texts), seq), np.int32)
  for row, documents in enumerate(texts):
    at = 0
    for number, text in enumerate(documents, 1):
      ids = TOKENIZER.encode(text)
      tokens[row, at : at + len(ids)], segments[row, at : at + len(ids)] = ids, number
      at += len(ids)
  return {"tokens": tokens, "segments": segments}


def test_documents_are_told_apart_and_ids_that_stand_for_nothing_are_named():
  batch = batch_of([("ab", "<b>cd</b>"), ("ef",)])
  batch["tokens"][1, 1] = 4096
  assert list(evidence.documents(TOKENIZER, batch, [5, 2])) == [
    "--- row 5, document 1\nab\n",
    "--- row 5, document 2\n<b>cd</b>\n",
    "--- row 2, document 1, ids that stand for nothing: [4096]\ne\n",
  ]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_are_written_of_any_numbers(channels):
  image = np.linspace(-3, 5, 4 * 5 * channels).reshape(4, 5, channels).astype(np.float32)
  image[0, 1] = np.nan
  read = np.asarray(Image.open(io.BytesIO(evidence.picture(image))))
  assert read.shape == ((4, 5, 3) if channels == 3 else (4, 5))
  assert read.min() == 0 and read[0, 1].max() == 0
  assert read.max() == 255 or channels == 2
  evidence.picture(np.full((2, 2, 3), np.nan))


def test_arrays_are_kept_beside_text_or_pictures(tmp_path):
  images = {"inputs": np.random.default_rng(0).normal(size=(2, 4, 5, 3)), "labels": np.arange(2)}
  path = epath.Path(tmp_path)
  evidence.keep_batch(path, faulty.Points().make(0), images, [6, 0])
  assert {p.name for p in tmp_path.iterdir()} == {"batch.npz", "batch-00.png", "batch-01.png"}
  found = np.load(tmp_path / "batch.npz", allow_pickle=False)
  assert found["rows"].tolist() == [6, 0]
  np.testing.assert_array_equal(found["inputs"], images["inputs"])
  evidence.keep_batch(path, faulty.Points().make(0), batch_of([("ab",)]), [0])  # Of no text.
  assert not (tmp_path / "batch.txt").exists()


def test_rows_are_read_in_the_order_that_is_asked_for():
  data = faulty.Points().make(0)
  batch, whole = evidence.read(data, 40, 8, [6, 0]), data.batch(40, 8)
  np.testing.assert_array_equal(batch["inputs"], whole["inputs"][[6, 0]])


def test_wrong_rows_are_kept_first_then_those_of_nan_then_the_largest_losses():
  wrong = np.arange(100) == 70
  losses = np.linspace(0, 1, 100)
  losses[4] = np.nan
  checked = Checked(0.0, 0.0, {}, {"x": wrong}, losses)
  rows = examine.worst_rows(checked)
  assert len(rows) == evidence.ROWS and rows[:4] == (70, 4, 99, 98)
  first = Checked(0.0, 0.0, {}, {"x": np.zeros(3, bool)}, None)
  assert examine.worst_rows(first) == (0, 1, 2)


def many_incidents() -> Experiment:
  """Steps 3, 7 and 11 are faults."""
  e = faulty.base()
  e.data.at, e.steps = (2 * faulty.BATCH, 6 * faulty.BATCH, 10 * faulty.BATCH), 12
  return e


def test_of_many_incidents_the_first_ones_have_their_batches(tmp_path, monkeypatch):
  monkeypatch.setattr(evidence, "BATCHES", 2)
  path = faulty.trained(many_incidents(), tmp_path / "run")
  kept = {name: faulty.kept(path, name) for name in ("00000003", "00000007", "00000011")}
  assert [(folder / "batch.npz").exists() for _, folder in kept.values()] == [True, True, False]
  notes = [about["note"] for about, _ in kept.values()]
  assert notes == ["", "", "its batch is not kept, as those of 2 incidents before it are"]
  assert [event.get("note", "") for event in runs.events(path, "incident")] == notes


@pytest.mark.parametrize("damage", ["{}", "[]", '{"exam', '{"examples": 3}'])
def test_a_damaged_record_of_an_incident_ends_nothing_and_is_left_as_it_is(damage, tmp_path):
  folder = tmp_path / "run" / "incidents" / "00000003"

  def plant(run):
    folder.mkdir(parents=True)
    (folder / "incident.json").write_text(damage)

  path = faulty.trained(many_incidents(), tmp_path / "run", parts=[faulty.Plant(1, plant)])
  assert (folder / "incident.json").read_text() == damage
  assert faulty.kept(path, "00000003-2")[0]["step"] == 3
  assert runs.events(path, "incident")[0]["path"] == "incidents/00000003-2"


def test_what_cannot_be_kept_ends_nothing(tmp_path):
  def plant(run):
    (tmp_path / "run" / "incidents").write_text("a file")

  path = faulty.trained(many_incidents(), tmp_path / "run", parts=[faulty.Plant(1, plant)])
  events = runs.events(path, "incident")
  assert len(events) == 3 and all("it could not be kept" in event["note"] for event in events)


def test_records_of_a_fault_hold_no_secret_and_no_half_of_one(tmp_path, monkeypatch):
  """Wherever a message is cut."""
  monkeypatch.setenv("STORE_PASSWORD", "correct-horse-77")

  def fail(*_):
    raise OSError("https://me:x1y2z3@store: " + "correct-horse-77 " * 200)

  monkeypatch.setattr(evidence, "read", fail)
  monkeypatch.setattr(examine, "Check", fail)
  e = many_incidents()
  e.faults.examine = 1
  with pytest.raises(OSError, match="correct-horse"):
    faulty.trained(e, tmp_path / "run", parts=[faulty.Plant(5, fail)])
  written = [path for path in (tmp_path / "run").rglob("*.json*") if path.is_file()]
  assert {"incident.json", "events.jsonl"} <= {path.name for path in written}
  for path in written:
    assert "corr" not in path.read_text() and "x1y2z3" not in path.read_text(), path
  assert "https://me:[hidden]@store" in faulty.kept(tmp_path / "run", "00000003")[0]["note"]
  assert "examination failed: OSError" in faulty.kept(tmp_path / "run", "00000003")[0]["note"]


def test_an_examination_that_fails_without_a_word_ends_nothing(tmp_path, monkeypatch):
  def fail(*_):
    raise AssertionError

  monkeypatch.setattr(examine, "Check", fail)
  e = many_incidents()
  e.faults.examine = 1
  path = faulty.trained(e, tmp_path / "run")
  assert faulty.kept(path, "00000003")[0]["note"] == "the examination failed: AssertionError: "


@pytest.mark.slow
def test_the_order_of_computation_is_the_same_on_a_mesh():
  found = []
  for mesh in (None, Mesh(data=2, fsdp=2, tensor=2)):
    e = packed.experiment(model={"layers": 2}, mesh=mesh or Mesh())
    made = None if mesh is None else mesh.make()
    with contextlib.nullcontext() if made is None else jax.set_mesh(made):
      state = jax.jit(Program(e, made).init)(jax.random.key(0))
      data = e.data.make(e.seed)
      batch = put(lambda rows, data=data: data.batch(0, 8, rows), 8, sharding.batch_sharding())
      found.append(Check(e, made, state, batch)(state, batch, 0))
  one, many = found
  assert list(one.sizes) == list(many.sizes)
  np.testing.assert_allclose(list(one.sizes.values()), list(many.sizes.values()), rtol=1e-4)
  np.testing.assert_allclose(one.losses, many.losses, rtol=1e-5)
  places = [list(one.sizes).index(name) for name in (
    "batch/tokens", "parameter/embed_VD", "output/transformer.00", "output/transformer.01", "loss",
    "gradient/transformer.01.feed_forward.down_FD", "gradient/transformer.00.attention.q_DKGH",
    "gradient/embed_VD", "gradient_norm",
  )]  # fmt: skip
  assert places == sorted(places)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.usefixtures("prepared")
def test_the_losses_of_rows_and_the_sizes_of_tensors_are_those_of_the_program(
  monkeypatch, microbatches
):
  monkeypatch.setattr(checks, "GROUPS", 4)
  e = runs.base()
  e.model.dropout, e.microbatches = 0.0, microbatches
  program = Program(e, None)
  state = jax.jit(program.init)(jax.random.key(0))
  batch = jax.device_put(e.data.make(0).batch(0, 8))
  found = Check(e, None, state, batch)(state, batch, 3)
  for group in range(4):
    rows = slice(2 * group, 2 * group + 2)
    part = {name: x[rows] for name, x in batch.items()}
    output = e.objective(state.module, part, None)
    wanted = output.loss_sum / output.weight
    np.testing.assert_allclose(found.losses[rows], [wanted] * 2, rtol=1e-5)
  _, metrics = jax.jit(program.step)(state, batch)
  np.testing.assert_allclose(found.loss, metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(found.norm, metrics["gradient_norm"], rtol=1e-5)
  order = ["parameter/embed_VD", "loss", "gradient/embed_VD", "gradient_norm"]
  assert list(found.sizes)[-4:] == order
  largest = float(np.abs(state.model.embed_VD[...]).max())
  np.testing.assert_allclose(found.sizes["parameter/embed_VD"], largest, rtol=1e-6)
