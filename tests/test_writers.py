"""What a run shows on the console, read as people read it."""

import io
import re
import time
import types
from pathlib import Path

import jax
import pytest
import tensorboardX
from flax import nnx

from bigtrain import console, writers
from bigtrain.data.tokenizers import ByteTokenizer
from bigtrain.experiment import Evaluation
from bigtrain.optim.schedule import Constant, Cosine
from bigtrain.parts import Part
from bigtrain.train import train
from bigtrain.writers import Console, TensorBoard, default_writers
from tests import classes, packed, runs
from tests.bigram import Bigram

pytestmark = pytest.mark.usefixtures("prepared")


def experiment(steps: int):
  e = runs.base()
  e.steps, e.optimizer.schedule = steps, Constant()
  e.evaluation = Evaluation(every=2, batch=8)
  return e


@pytest.fixture(scope="module")
def shown(prepared, tmp_path_factory):
  """The directory and the lines of a run of 3 steps, and of its continuation to 4."""
  run_dir, lines = tmp_path_factory.mktemp("shown") / "run", []
  with pytest.MonkeyPatch.context() as patch:
    for steps in (3, 4):
      patch.setattr("sys.stderr", err := io.StringIO())
      train(experiment(steps), run_dir, allow_changes=True)
      lines.append([line.rstrip() for line in err.getvalue().splitlines()])
  return run_dir, *lines


def test_the_head_says_what_is_trained_where_and_on_how_much(shown):
  run_dir, lines, _ = shown
  assert lines[0] == str(run_dir)
  head = dict(line.split(maxsplit=1) for line in lines[1:5])
  assert head["model"] == f"{384 * 32 / 1000:.3g}K parameters"
  assert head["devices"] == "8 cpu, fsdp=8"
  assert re.fullmatch(r"[\d.]+K tokens of \d+ documents, [\d.]+K? held out", head["data"])
  assert head["training"] == "3 steps x 8 rows x 64 tokens = 1.54K tokens"


def test_rows_come_in_the_order_of_what_happened_and_the_first_has_no_speed(shown):
  _, lines, _ = shown
  rows = [line for line in lines if re.match(r"(step|eval) ", line)]
  assert [row.split()[:2] for row in rows] == [
    ["step", "1/3"],
    ["step", "2/3"],
    ["eval", "2"],
    ["step", "3/3"],
    ["eval", "3"],
  ]
  number = r"[\d.,e+-]+"
  step = rf"step \d/3  loss {number}  grad {number}  lr 3\.00e-02"
  assert re.fullmatch(step, rows[0])
  for row in (rows[1], rows[3]):
    assert re.fullmatch(rf"{step}  {number} tok/s(  waited {number}%)?  left 0:00:0\d", row)
  metrics = ("accuracy", "bits per byte", "nats per byte", "perplexity")
  assert re.fullmatch(
    r"eval 2    loss " + number + "".join(f"  {m} {number}" for m in metrics), rows[2]
  )


def test_the_tail_says_how_it_ended_and_what_to_do_next(shown):
  run_dir, lines, _ = shown
  tail = lines[lines.index(str(run_dir), 1) :]
  assert re.fullmatch(r"  done      3 steps in 0:\d\d:\d\d", tail[1])
  rest = [line for line in tail[2:] if "of which" not in line]
  assert re.fullmatch(r"  loss      [\d.]+ at the last step", rest[0])
  assert re.match(r"  held out  loss [\d.]+  ", rest[1])
  assert rest[2:] == [
    f"  next      bigtrain evaluate {run_dir}",
    f"            bigtrain sample {run_dir} --prompt 'It was'",
  ]


def of_tokens_alone(steps):
  """A model that could be sampled, on data that have no tokenizer."""
  e = packed.experiment(steps=steps)
  e.model = Bigram(vocab=packed.V)
  return e


@pytest.mark.parametrize(
  "make", [lambda steps: classes.experiment(classes.MODELS["mlp"], steps=steps), of_tokens_alone]
)
def test_sampling_is_no_next_step_of_a_run_without_text(make, tmp_path, capsys):
  train(make(steps=1), tmp_path / "run")
  assert "bigtrain evaluate" in (err := capsys.readouterr().err)
  assert "bigtrain sample" not in err


def test_a_resumed_run_says_from_where_it_goes_on(shown):
  _, _, lines = shown
  assert "  resumed   going on from step 3 of 4" in lines
  assert any(re.match(r"  done      1 step in", line) for line in lines)


def test_nothing_is_shown_of_a_run_that_is_quiet_or_finished(tmp_path, capsys):
  e = experiment(1)
  train(e, tmp_path, quiet=True)
  assert capsys.readouterr().err == ""
  train(e, tmp_path)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"bigtrain: {tmp_path} has done its 1 steps")


def test_a_run_that_fails_has_no_tail(tmp_path, capsys):
  class Fail(Part):
    def after_step(self, step, metrics):
      raise ValueError("planted")

  with pytest.raises(ValueError, match="planted"):
    train(experiment(1), tmp_path, parts=[Fail()])
  assert "done" not in capsys.readouterr().err


def fake(e=None, **fields):
  directory = types.SimpleNamespace(path=Path("runs/a"), writes=True)
  defaults = {"experiment": e or experiment(10), "directory": directory, "mesh": None}
  return types.SimpleNamespace(**defaults | fields)


@pytest.mark.parametrize(
  ("phase", "told"),
  [
    ("compile", "compiling ..."),
    ("save", "saving ..."),
    ("verify", "verify ..."),
  ],
)
def test_what_lasts_is_told_while_it_lasts(capsys, monkeypatch, phase, told):
  monkeypatch.setattr(console, "MOMENT", 0.02)
  with Console(fake()).phase(phase):
    time.sleep(0.2)
    assert capsys.readouterr().err == f"{told}\n"
  monkeypatch.setattr(console, "MOMENT", 60)
  with Console(fake()).phase(phase):
    pass
  assert capsys.readouterr().err == ""


def test_texts_are_indented_and_cannot_command_the_terminal(capsys):
  Console(fake()).text(3, "It [was]", " a\ttruth\x1b[2J\n" + "very " * 30)
  lines = capsys.readouterr().err.splitlines()
  assert re.fullmatch(r"    It \[was\] a +truth\N{REPLACEMENT CHARACTER}\[2J", lines[0])
  assert len(lines) > 2 and all(re.match(r"    \S", line) and len(line) <= 80 for line in lines)


def test_rates_are_those_that_were_measured(capsys):
  shared = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 0.1}
  speed = {"step_seconds": 2.0, "input_wait_seconds": 0.1, "examples_per_second": 1234.5}
  Console(fake()).row(7, "train", shared | speed | {"mfu": 0.4})
  assert capsys.readouterr().err == (
    "step  7/10  loss 1.0000  grad 1.00  lr 1.00e-01  1,234 examples/s  mfu 40.0%  waited 5.0%"
    "  left 0:00:06\n"
  )


def test_the_amount_counts_growing_batches_and_data_without_tokens(monkeypatch):
  e = packed.experiment(steps=10, batch=8, batch_stages=((4, 16), (8, 32)))
  assert writers._amount(fake(e, batch_shape=lambda step: (8, 11))) == (
    "10 steps x 8 to 32 rows x 11 tokens = 1.76K tokens"
  )
  e.batch_stages = ()
  for length, amount in ((lambda step: None, "80 examples"), (lambda step: 11 + step, "80 rows")):
    run = fake(e, batch_shape=lambda step, length=length: (8, length(step)))
    assert writers._amount(run).endswith(f"10 steps x 8 {amount.split()[1]} = {amount}")


def test_tensorboard_hides_what_lies_past_the_step_that_a_run_goes_on_from(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(tensorboardX, "SummaryWriter", lambda *a, **k: made.append((a, k)))
  TensorBoard(fake(directory=types.SimpleNamespace(path=tmp_path))).start(7)
  assert made == [((str(tmp_path / "tensorboard"),), {"purge_step": 8})]


def test_tensorboard_is_not_given_what_is_no_number(tmp_path, capfd):
  writer = TensorBoard(fake(directory=types.SimpleNamespace(path=tmp_path)))
  writer.start(0)
  added = []
  writer.writer.add_scalar = lambda *args: added.append(args)
  writer.row(1, "train", {"loss": 1.0, "loss/books": float("nan"), "loss/web": float("inf")})
  writer.close()
  assert added == [("train/loss", 1.0, 1)]


def test_commands_of_the_tail_are_as_they_have_to_be_typed(monkeypatch):
  monkeypatch.setenv("UV", "/usr/bin/uv")
  e = experiment(1)
  model = nnx.eval_shape(lambda: e.model.make(jax.random.key(0)))
  said = Console(fake(e, weights=model, tokenizer=ByteTokenizer()))._sampling("runs/a b")
  assert said == "uv run bigtrain sample 'runs/a b' --prompt 'It was'"


def test_a_warm_up_too_long_is_told_to_a_run_that_trains_and_not_to_one_that_is_done(
  tmp_path, capsys
):
  e = experiment(1)
  e.optimizer.schedule = Cosine(warmup=5)
  train(e, tmp_path, quiet=True)
  assert "warmup is 5 steps but the run has 1" in capsys.readouterr().err
  train(e, tmp_path, quiet=True)
  assert "warmup" not in capsys.readouterr().err


def test_only_the_first_process_writes():
  run = fake()
  run.experiment.logging.tensorboard = True
  assert [*map(type, default_writers(run, quiet=False))] == [Console, TensorBoard]
  assert [*map(type, default_writers(run, quiet=True))] == [TensorBoard]
  run.directory.writes = False
  assert default_writers(run, quiet=False) == []
