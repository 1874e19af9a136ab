"""The command line: what it prints, what it passes on, and its exit codes."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from bigtrain import cli, load
from bigtrain.config import dump
from bigtrain.exit_codes import Exit
from bigtrain.experiment import Experiment
from bigtrain.flags import _meant
from tests import toys

STUDY = """
from bigtrain import Experiment
from tests import toys

def base() -> Experiment:
  return toys.experiment()

def wrong() -> Experiment:
  return toys.experiment(steps="100")
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs a command where experiments/study.py stands and training is recorded, not done."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  (tmp_path / "experiments").mkdir()
  (tmp_path / "experiments/study.py").write_text(STUDY)
  calls = []

  def train(experiment, run_dir, **settings):
    calls.append(types.SimpleNamespace(experiment=experiment, run_dir=run_dir, **settings))
    return types.SimpleNamespace(left=experiment.seed == 3)

  monkeypatch.setitem(sys.modules, "bigtrain.train", types.SimpleNamespace(train=train))

  def run(*argv):
    try:
      code = cli.main(argv)
    except SystemExit as error:
      code = error.code
    out, err = capsys.readouterr()
    return types.SimpleNamespace(code=code, out=out, err=err, call=calls.pop() if calls else None)

  return run


def test_overrides_change_leaves_and_nothing_else(run):
  result = run("train", "experiments/study.py", "--steps", "7", "--model.pattern.1.heads", "8")
  expected = toys.experiment(steps=7)
  expected.model.pattern[1].heads = 8
  assert result.code == Exit.DONE and result.call.experiment == expected
  assert result.call.run_dir == "runs/study" and str(result.call.source) == "experiments/study.py"


@pytest.mark.parametrize(
  ("arguments", "get", "value"),
  [
    ("--model.pattern.1.position.theta 5e5", lambda e: e.model.pattern[1].position.theta, 5e5),
    ("--model.position.length 512", lambda e: e.model.position, toys.Learned(length=512)),
    ("--model.dropout 0.5", lambda e: e.model.dropout, 0.5),
    ("--checkpoints.keep_every 9", lambda e: e.checkpoints.keep_every, 9),
    ("--checkpoints.keep-every None", lambda e: e.checkpoints.keep_every, None),
    ("--model.activation silu", lambda e: e.model.activation, "silu"),
    ("--model.no_tied", lambda e: e.model.tied, False),
    ("--data.files b.txt c.txt", lambda e: e.data.files, ("b.txt", "c.txt")),
    ("--batch_stages 5 64 9 128", lambda e: e.batch_stages, ((5, 64), (9, 128))),
    ("--mesh.fsdp 2", lambda e: e.mesh.fsdp, 2),
  ],
)
def test_every_kind_of_leaf_can_be_overridden(run, arguments, get, value):
  e = run("train", "experiments/study.py", *arguments.split()).call.experiment
  assert get(e) == value and type(get(e)) is type(value)


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ("--optimizer.l 3", "there is no flag --optimizer.l; did you mean --optimizer.lr?"),
    ("--lr 3", "there is no flag --lr; did you mean --optimizer.lr?"),
    ("--stps=3", "there is no flag --stps; did you mean --steps?"),
    ("--dri x", "there is no flag --dri; did you mean --dir?"),
    (
      "--quiet --nothing-like-it",
      "--nothing_like_it; `bigtrain train experiments/study.py",
    ),
    ("steps 3", "there is no flag steps; did you mean --steps?"),
    ("--steps many", "--steps must be int, not 'many'"),
    ("--seed 1 --steps", "--steps must be int, and none is given"),
    ("--steps 3 4", "--steps must be int, not '3 4'"),
    ("--checkpoints.keep-every x", "--checkpoints.keep_every must be int or None, not 'x'"),
    ("--model.activation gelu", "--model.activation must be 'relu' or 'silu', not 'gelu'"),
    ("--model.tied false", "takes no value: write --model.tied or --model.no_tied"),
    ("--smoke true --quiet", "--smoke takes no value: write --smoke or --no_smoke"),
    ("--model.pattern.0.position.theta 3", "model.pattern.0.position is None, and only the exper"),
    ("--optimizer sgd", "optimizer is Sgd(...), and only the experiment file sets it, by e.optim"),
  ],
)
def test_a_wrong_flag_is_refused_in_one_line_that_names_the_right_one(run, arguments, expected):
  result = run("train", "experiments/study.py", *arguments.split())
  assert result.code == Exit.REFUSED and expected in result.err and result.call is None
  assert result.err.startswith("bigtrain: ") and result.err.count("\n") == 1
  assert len(result.err) < 180


@pytest.mark.parametrize(
  ("argv", "expected"),
  [
    ("tran x", "bigtrain: there is no command 'tran'; did you mean 'train'?"),
    ("train", "bigtrain train takes EXPERIMENT first: bigtrain train experiments/"),
    ("train --smoke experiments/study.py", "bigtrain train takes EXPERIMENT first"),
    ("train experiments/study.py:bse", "has no function 'bse'; did you mean 'base'?"),
    ("train experiments/study.py:wrong", "bigtrain: steps must be int, not '100' (str)"),
    ("train experiments/study.py --batch 32 --microbatches 0", "microbatches must be at least 1"),
    ("evaluate experiments/study.py:a", "takes a run, not its experiment: give runs/study-a"),
    ("train runs/none", "there is no run directory runs/none; there is experiments/study.py"),
  ],
)
def test_what_is_refused_is_one_message_and_code_2(run, argv, expected):
  result = run(*argv.split())
  assert result.code == Exit.REFUSED and expected in result.err and result.call is None
  assert "Traceback" not in result.err


def test_what_is_no_experiment_is_named_and_the_runs_that_there_are(run):
  Path("README.md").touch()
  assert "README.md is no .py file, as experiments are; there" in run("train", "README.md").err
  load.write(toys.experiment(), "runs/study")
  Path("runs/study/metrics.jsonl").touch()
  for command in ("train", "evaluate"):
    said = run(command, "runs/stdy").err
    assert "there is no run directory runs/stdy; did you mean 'runs/study'?" in said


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    ("train", "train takes EXPERIMENT first: {}bigtrain train experiments/"),
    ("--help", "example:    {}bigtrain train experiments/quickstart.py"),
    ("data prepare", "first: {}bigtrain data prepare experiments/data/austen.py"),
    ("data fetch", "first: {}bigtrain data fetch fashion_mnist"),
  ],
)
def test_commands_are_spelt_as_they_have_to_be_typed(argv, said, run, monkeypatch):
  spoken = lambda: "".join(vars(run(*argv.split()))[name] for name in ("out", "err"))
  assert said.format("") in spoken()
  monkeypatch.setenv("UV", "/usr/bin/uv")
  extra = "--extra data " if "prepare" in argv else ""
  assert said.format(f"uv run {extra}") in spoken()


def test_a_name_that_is_nearly_right_is_answered_by_the_nearest_flag():
  flags = ["model.classes", "data.source.classes", "data.size", "model.image", "optimizer.lr"]
  for name, meant in (
    ("data.sorce.classes", "data.source.classes"),
    ("modle.classes", "model.classes"),
    ("lr", "optimizer.lr"),
    ("classes", "model.classes"),
  ):
    assert _meant(name, flags, {}, "bigtrain") == f"; did you mean --{meant}?"
  said = _meant("model.size", flags, {}, "bigtrain")  # The place may be what is right.
  assert said == "; did you mean --data.size? model has classes, image"


def test_a_traceback_is_shown_when_asked_for(run, monkeypatch):
  monkeypatch.setenv("BIGTRAIN_TRACEBACK", "1")
  assert "Traceback" in run("train", "experiments/study.py:bse").err


def test_run_flags_reach_the_run_and_never_the_experiment(run):
  flags = "--dir runs/a --quiet --allow_changes --profile.start 5 --profile.steps 2"
  call = run("train", "experiments/study.py", *flags.split()).call
  assert (call.run_dir, call.quiet, call.allow_changes) == ("runs/a", True, True)
  [profiler] = call.parts
  assert (profiler.first, profiler.last) == (5, 7)
  assert call.experiment == toys.experiment()


def test_smoke_shrinks_before_overrides_and_has_its_own_run_directory(run):
  call = run("train", "experiments/study.py", "--smoke", "--steps", "90").call
  assert call.run_dir == "runs/study-smoke"
  assert call.experiment.steps == 90 and call.experiment.batch == 8


def test_a_run_directory_is_trained_again_from_its_config(run):
  load.write(toys.experiment(steps=77), "runs/before")
  call = run("train", "runs/before").call
  assert call.run_dir == "runs/before" and call.experiment.steps == 77 and call.source is None


def test_a_run_that_left_on_a_signal_exits_with_its_code(run):
  assert run("train", "experiments/study.py", "--seed", "3").code == Exit.LEFT


def test_help_lists_every_field_with_its_default_and_comment(run):
  result = run("train", "experiments/study.py", "--help")
  out = re.sub(r"[│\s]+", " ", result.out)
  assert result.code == Exit.DONE
  assert "--model.pattern.1.position.theta FLOAT The longest wavelength. (default: 10000.0)" in out
  assert "--optimizer.lr FLOAT Peak learning rate. (default: 0.1)" in out
  assert "--checkpoints.keep INT The newest ones. (default: 2)" in out
  in_file = {"mesh", "products"}  # Objects, which are set in the file.
  for name in set(leaf_names(dump(toys.experiment()))) - in_file:
    assert f"--{name}" in out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("command", ["train experiments/quickstart.py", "sample", "evaluate"])
def test_every_flag_has_a_line_of_help(command, capsys, monkeypatch):
  monkeypatch.chdir(Path(__file__).parent.parent)
  with pytest.raises(SystemExit):
    cli.main([*command.split(), "--help"])
  flags = re.findall(r"(--\w.*)\n\s*(.*)", re.sub("[│╭╮╰╯─]", "", capsys.readouterr().out))
  assert not [flag for flag, text in flags if text.startswith("(default")]


def leaf_names(tree, path=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaf_names(value, f"{path}{name}.")
    elif name not in ("class", "pattern") and not (value is None and name == "position"):
      yield path + name


def test_no_field_of_an_experiment_has_the_name_of_a_run_flag():
  assert not set(Experiment.__dataclass_fields__) & set(cli.RESERVED)


def test_help_of_each_command_names_its_arguments(run):
  assert "--smoke" in run("train", "--help").out
  assert "--prompt" in run("sample", "--help").out
  assert run("evaluate", "--help").code == Exit.DONE
  assert all(name in run("--help").out for name in cli.COMMANDS)


def test_sample_and_evaluate_pass_their_arguments_to_the_run(run, monkeypatch):
  class Run:
    def __init__(self, run_dir):
      self.run_dir = run_dir

    def evaluate(self):
      return {"loss": 1.25, "of": float(self.run_dir == "runs/a")}

    def sample(self, prompt, tokens, temperature, top_k, top_p, seed, samples):
      return [f" {tokens} {temperature} {top_k} {top_p} {seed}"] * samples

  monkeypatch.setitem(sys.modules, "bigtrain.run", types.SimpleNamespace(load_run=Run))
  assert run("evaluate", "runs/a").out == "loss 1.25\nof 1\n"
  flags = "--tokens 5 --top_k 3 --temperature 0 --samples 2 --seed 9"
  result = run("sample", "runs/a", "--prompt", "It was", *flags.split())
  assert result.out == "It was 5 0.0 3 None 9\n---\nIt was 5 0.0 3 None 9\n"
  assert "sample takes RUN first" in run("sample", "--prompt", "x").err


@pytest.mark.smoke
def test_help_of_the_command_does_not_import_jax():
  code = "import sys, bigtrain.cli as c; c.main(['--help']); print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "usage: bigtrain" in out.stdout and out.stdout.strip().endswith("False")


@pytest.mark.smoke
def test_ctrl_c_while_python_ends_changes_no_exit_code():
  late = "atexit.register(os.kill, os.getpid(), signal.SIGINT)"
  code = f"import atexit, os, signal, sys, bigtrain.cli as c; {late}; sys.argv[1:] = []; c.main()"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (Exit.DONE, "")


@pytest.mark.smoke
def test_the_process_exits_with_2_and_one_line(tmp_path):
  command = [sys.executable, "-m", "bigtrain.cli", "train", str(tmp_path / "none.py")]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == Exit.REFUSED and done.stderr.count("\n") == 1
