"""The trust boundary: data, checkpoints and records run no code and lead nowhere, secrets stay."""

import ast
import gc
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from bigtrain import cli, config, load
from bigtrain.checkpoint import Store
from bigtrain.config import Refused, dump
from bigtrain.data.arrays import Arrays
from bigtrain.data.fetch import DATASETS, Fetch, fetch
from bigtrain.data.folders import ImageFolder
from bigtrain.data.readers import Problem, read
from bigtrain.data.sources import PreparedText
from bigtrain.data.tfds import TFDS
from bigtrain.diagnose import read as read_records
from bigtrain.exit_codes import Exit
from bigtrain.experiment import Checkpoints
from bigtrain.run_directory import RunDirectory, environment
from bigtrain.saved import Saved
from bigtrain.secrets import HIDDEN, redacted
from tests import toys

PACKAGE = Path(cli.__file__).parent
TOKEN = "hf_" + "aB3dE5fG7hJ9kL1mN3pQ5rS7"


class Bomb:
  """What is unpickled as this leaves a file behind."""

  def __init__(self, mark: Path):
    self.mark = mark

  def __reduce__(self):
    return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
  """A file that is there as soon as a bomb went off."""
  path = tmp_path / "exploded"
  pickle.loads(pickle.dumps(Bomb(path)))
  assert path.exists()
  path.unlink()
  return path


def trees():
  for path in PACKAGE.rglob("*.py"):
    yield path, ast.parse(path.read_text())


UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "joblib"}
# It only writes, as the test below says.
WRITES = {"launch/text.py": "yaml"}


def test_yaml_is_only_written():
  for name, module in WRITES.items():
    calls = re.findall(rf"\b{module}\.(\w+)\(", (PACKAGE / name).read_text())
    assert calls and set(calls) == {"dump"}, calls


def test_no_module_can_unpickle_or_evaluate_text():
  for path, tree in trees():
    for node in ast.walk(tree):
      if isinstance(node, ast.Import | ast.ImportFrom):
        names = {a.name for a in node.names} | {getattr(node, "module", None)}
        found = names & UNSAFE - {WRITES.get(str(path.relative_to(PACKAGE)))}
        assert not found, f"{path} imports {found}"
      if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        assert name not in ("eval", "exec", "__import__"), f"{path}:{node.lineno}"
        given = {k.arg for k in node.keywords}
        assert not given & {"allow_pickle", "trust_remote_code", "shell"}, f"{path}:{node.lineno}"


def test_nothing_listens_on_more_than_this_machine():
  pages = [*PACKAGE.parent.glob("docs/*.md"), PACKAGE.parent / "README.md"]
  pages = [page for page in pages if page.name != "security.md"]  # Which says what not to do.
  for path in [*PACKAGE.rglob("*.py"), *pages]:
    for word in ("0.0.0.0", "--bind_all", "start_server(", "http.server"):
      assert word not in path.read_text(), f"{path} has {word}"


def test_arrays_with_pickled_objects_are_refused(tmp_path, mark):
  with (tmp_path / "x.npz").open("wb") as file:
    np.savez(file, inputs=np.array([Bomb(mark)], object), labels=np.zeros(1, int))
  with pytest.raises(Refused, match="cannot be read"):
    Arrays(train=str(tmp_path / "x.npz"), size=(2,), classes=2).open()
  np.save(tmp_path / "inputs.npy", np.array([Bomb(mark)], object), allow_pickle=True)
  np.save(tmp_path / "labels.npy", np.zeros(1, int))
  with pytest.raises(Refused, match="cannot be read"):
    Arrays(train=str(tmp_path), size=(2,), classes=2).open()
  assert not mark.exists()


def test_a_parquet_file_with_a_pickled_type_is_read_as_its_storage(tmp_path, mark):
  of = {
    b"ARROW:extension:name": b"arrow.py_extension_type",
    b"ARROW:extension:metadata": pickle.dumps(Bomb(mark)),
  }
  field = pa.field("text", pa.string(), metadata=of)
  table = pa.table([pa.array(["harmless"])], schema=pa.schema([field]))
  pa.parquet.write_table(table, tmp_path / "x.parquet")
  found = list(read(tmp_path / "x.parquet", "text", 1000, lambda n: None))
  assert found == ["harmless"] and not mark.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's readers.
def test_no_file_of_a_checkpoint_is_unpickled(tmp_path, mark):
  state = {"model": {"w": jnp.ones((4, 4))}, "step": jnp.zeros((), jnp.int32)}
  with Store(tmp_path / "checkpoints", Checkpoints()) as store:
    store.save(1, state, toys.experiment())
  whole = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
  assert len(whole) > 5
  for path in whole:
    before = path.read_bytes()
    path.write_bytes(pickle.dumps(Bomb(mark)))
    try:
      Saved(tmp_path / "checkpoints").restore(1, state)
    except Exception as error:
      assert not isinstance(error, pickle.UnpicklingError), path
    gc.collect()  # Orbax's other reads, which fail too.
    assert not mark.exists(), path
    path.write_bytes(before)


@pytest.mark.parametrize(
  "name",
  ["tests.evil_module:Any", "os:system", "pathlib:Path", "subprocess:Popen", "dataclasses:Field"],
)
def test_a_recorded_config_makes_nothing_but_configs_and_imports_nothing(name, tmp_path):
  tree = dump(toys.experiment())
  tree["model"] = {"class": name, "args": "touch exploded"}
  before = set(sys.modules)
  with pytest.raises(Refused, match=r"not loaded|not a config class|no class"):
    config.restore(json.loads(json.dumps(tree)))
  assert set(sys.modules) == before


def test_a_recorded_config_finds_classes_that_its_experiment_file_imports(tmp_path):
  """Also in a process that has not loaded them; without the file they are refused."""
  load.write(toys.experiment(), tmp_path)
  code = f"""if True:
    import pathlib
    from bigtrain import load
    from bigtrain.config import Refused
    try:
      load.read({str(tmp_path)!r})
    except Refused as error:
      print("tests.toys, which is not loaded: import it before" in str(error))
    pathlib.Path({str(tmp_path / "experiment.py")!r}).write_text("from tests import toys")
    print(type(load.read({str(tmp_path)!r})[0].model).__name__)"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
  assert done.stdout == "True\nModel\n", done.stderr


def test_reading_the_records_of_a_run_runs_none_of_its_code(tmp_path, mark):
  directory = RunDirectory(tmp_path / "run")
  directory.begin(toys.experiment(), None, allow_changes=False)
  directory.row(1, "train", {"loss": 1.0})
  directory.close()
  code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
  (tmp_path / "run" / "experiment.py").write_text(code)
  text = (tmp_path / "run" / "config.json").read_text()
  (tmp_path / "run" / "config.json").write_text(text.replace("tests.toys", "experiment.py"))
  read_records(tmp_path / "run")
  assert not mark.exists()


@pytest.mark.parametrize("name", ["../escape.npy", "/tmp/escape.npy", "a/../../escape.npy"])
def test_members_of_an_archive_write_nothing(name, tmp_path):
  (tmp_path / "in").mkdir()
  array = io.BytesIO()
  np.save(array, np.zeros(3))
  with zipfile.ZipFile(tmp_path / "in" / "x.npz", "w") as file:
    file.writestr(name, array.getvalue())
    for part, values in (("inputs", np.zeros((2, 2))), ("labels", np.zeros(2, int))):
      array = io.BytesIO()
      np.save(array, values)
      file.writestr(f"{part}.npy", array.getvalue())
  before = sorted(tmp_path.rglob("*"))
  Arrays(train=str(tmp_path / "in" / "x.npz"), size=(2,), classes=1).open()
  assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/escape.npy").exists()


def test_a_tar_archive_is_no_data(tmp_path):
  """Nothing here unpacks one: links and paths in it lead nowhere."""
  with tarfile.open(tmp_path / "x.txt.tar", "w") as file:
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    file.addfile(link)
  (found,) = read(tmp_path / "x.txt.tar", "text", 1000, lambda n: None)
  assert isinstance(found, Problem) and found.kind == "not .txt, .jsonl or .parquet"
  for path, tree in trees():
    for node in ast.walk(tree):
      called = node.attr if isinstance(node, ast.Attribute) else ""
      assert called not in ("extractall", "extract_all", "unpack_archive"), path


@pytest.mark.parametrize("name", ["../train.jsonl.zst", "/etc/passwd", "train/../../x"])
def test_a_manifest_names_no_file_outside_its_folder(name, tmp_path):
  (tmp_path / "shards").mkdir()
  (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"file": name, "sha256": "0"}]}))
  with pytest.raises(Refused, match="which is no shard of that folder"):
    PreparedText(path=str(tmp_path)).inputs()


@pytest.mark.parametrize("name", ["../fashion_mnist", "/etc", "fashion_mnist/..", ""])
def test_only_datasets_of_the_table_are_fetched(name, tmp_path):
  with pytest.raises(Refused, match="no dataset"):
    fetch(name, Fetch(out=str(tmp_path / "out")))
  assert not (tmp_path / "out").exists()
  for files, _ in DATASETS.values():
    assert all(len(digest) == 64 and Path(file).name == file for file, digest in files.items())


@pytest.mark.parametrize(
  "name",
  ["../x", "huggingface:evil/x", "kaggle:x", "x/..", "x/a=1,data_dir=/etc", "/etc/x", "x/../../y"],
)
def test_a_name_of_tfds_fetches_no_code_and_leaves_its_folder_not(name):
  with pytest.raises(Refused, match="is no name of a dataset"):
    TFDS(name=name, classes=2).check()


@pytest.mark.parametrize(
  "name", ["cifar10", "imagenet2012:5.1.0", "glue/sst2:1.*.*", "c4/en.noclean"]
)
def test_names_of_tfds_are_taken(name):
  TFDS(name=name, classes=2).check()


def test_a_prepared_dataset_imports_no_module_that_it_names(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  folder = tmp_path / "evil" / "1.0.0"
  folder.mkdir(parents=True)
  features = {"featuresDict": {"features": {"x": {"pythonClassName": "antigravity.Feature"}}}}
  (folder / "features.json").write_text(json.dumps(features))
  with pytest.raises(Refused, match=r"names the class antigravity\.Feature"):
    TFDS(name="evil", classes=2, data_dir=str(tmp_path)).open()
  assert "antigravity" not in sys.modules


def test_folders_of_images_are_the_only_ones_looked_into(tmp_path):
  """A name of a class or file is one that the folder has; hidden ones are not read."""
  for name in ("cat", "dog", ".git"):
    (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / name / "x.png").write_bytes(b"x")
  (tmp_path / "in" / "cat" / ".secret").write_text("x")
  split = ImageFolder(train=str(tmp_path / "in"), classes=2).open().train
  assert [split.where(i) for i in range(len(split))] == [
    str(tmp_path / "in" / name / "x.png") for name in ("cat", "dog")
  ]


SECRETS = [
  (f"login with {TOKEN} failed", f"login with {HIDDEN} failed"),
  ("s3://AKIAIOSFODNN7EXAMPLE@bucket", f"s3://{HIDDEN}@bucket"),
  ("https://me:pa55@host/x", f"https://me:{HIDDEN}@host/x"),
  ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {HIDDEN}"),
  ("{'authorization': 'Basic Zm9vOmJhcg=='}", f"{{'authorization': 'Basic {HIDDEN}'}}"),
  ("GET /x?token=9f8e7d6c5b4a&n=1", f"GET /x?token={HIDDEN}&n=1"),
  ('{"api_key": "short"}', f'{{"api_key": "{HIDDEN}"}}'),
  ("db_password: hunter2", f"db_password: {HIDDEN}"),
  ("SECRET=x", f"SECRET={HIDDEN}"),
  ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----.", f"{HIDDEN}."),
  ("eyJhbGciOiJI.eyJzdWIiOiIx.c2ln here", f"{HIDDEN} here"),
  ("error: db: password=hunter2", f"error: db: password={HIDDEN}"),
  ("https://host/x?token=9f8e7d6c5b4a&n=1", f"https://host/x?token={HIDDEN}&n=1"),
  ("postgres://me:p@ss@host/x", f"postgres://me:{HIDDEN}@host/x"),
  (f"api_keys={'x' * 5000} {'y' * 9}", f"api_keys={HIDDEN} {'y' * 9}"),
]
NO_SECRETS = [
  "mask_token: [MASK], eot = <|endoftext|>, max_tokens=100000",
  "KeyError: 'model.layers.12.attention'",
  "key: model.segments.0.0.attention.q_DKGH is missing",
  "It was a secret: nobody knew the token of her regard, nor the key to it.",
  "a bearer whatever basic principles",
  "git revision 3f2c1b7a9e8d, tokenizer=/data/tokenizer-v12.json",
  "https://host:8080/path@2",
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_are_hidden(text, shown):
  assert redacted(text) == redacted(shown) == shown


PIECES = ("x", "a.b-", "eyJ-", "eyJaaaaaaaa.", "://a:", "-----BEGIN A ", "-----END ", "token=", " ",
          "password=", "Authorization: a ", "x: ", "a= ", "hf_")  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("before", ["", "token=", "-----BEGIN PRIVATE KEY-----", "Authorization"])
def test_the_time_that_hiding_takes_grows_with_the_text_and_not_with_its_square(before, piece):
  """30,000 characters took 10 to 20 seconds, and the report of a long word 17."""
  began = time.process_time()
  redacted(before + piece * (30_000 // len(piece)))
  assert time.process_time() - began < 1


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_is_shown(text):
  assert redacted(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch, tmp_path):
  monkeypatch.setenv("STORE_PASSWORD", "correct horse")
  monkeypatch.setenv("BIGTRAIN_TEST_TOKEN", "plainword")
  monkeypatch.setenv("DB_PASSWORD", "90210345678")
  monkeypatch.setenv("MAX_TOKEN", "100000")
  monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
  monkeypatch.setenv("CREDENTIALS_FILE_SECRET", str(tmp_path))  # A path is none.
  text = f"correct horse, plainword, 90210345678, 100000, falsehood, {tmp_path}"
  assert redacted(text) == f"{HIDDEN}, {HIDDEN}, {HIDDEN}, 100000, falsehood, {tmp_path}"


def test_flags_and_fields_hide_their_values_at_any_depth():
  argv = [
    "train",
    "x.py",
    "--api_key",
    "abc",
    "--tokens",
    "200",
    "--logger.token",
    "a1b2c3d4e5f6g7",
  ]
  assert redacted(argv) == [
    "train", "x.py", "--api_key", HIDDEN, "--tokens", "200", "--logger.token", HIDDEN,
  ]  # fmt: skip
  assert redacted({"a": [{"password": "x", "steps": 3, "secret": None}]}) == {
    "a": [{"password": HIDDEN, "steps": 3, "secret": None}]
  }


def test_what_is_within_the_field_of_a_secret_is_hidden_be_it_text_or_numbers():
  found = {"password": 12345678, "api_keys": ["abc"], "token": {"value": "x1y2z3w4a5b6c7", "n": 3}}
  assert redacted(found) == {
    "password": HIDDEN, "api_keys": [HIDDEN], "token": {"value": HIDDEN, "n": 3},
  }  # fmt: skip
  layers = {"gradient/attention.key": 0.5, "tokens": [1, 2], "has_secret": True}
  assert redacted(layers) == layers


def test_no_record_and_no_message_of_a_run_holds_a_secret(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
  monkeypatch.setattr(sys, "argv", ["bigtrain", "train", "x.py", "--token", TOKEN])
  directory = RunDirectory(tmp_path / "run")
  directory.begin(toys.experiment(), None, allow_changes=False)
  directory.event("error", error="OSError: https://x:0123456789abcdef@host", argv=sys.argv)
  directory.close()
  for path in (tmp_path / "run").rglob("*"):
    if path.is_file():
      assert TOKEN not in path.read_text() and "0123456789abcdef" not in path.read_text(), path
  assert environment()["command"][-1] == HIDDEN
  assert cli.main(["train", f"runs/{TOKEN}"]) == Exit.REFUSED
  assert cli.main([TOKEN]) == Exit.REFUSED
  assert TOKEN not in capsys.readouterr().err


def test_the_traceback_of_a_command_that_fails_hides_secrets(tmp_path):
  (tmp_path / "x.py").write_text("")
  code = (
    "import sys; from bigtrain import cli\n"
    "def fail(arguments): raise RuntimeError(f'denied: {arguments[0]}')\n"
    "cli.train = fail\n"
    f"sys.argv = ['bigtrain', 'train', {TOKEN!r}]\n"
    "sys.exit(cli.main())\n"
  )
  environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment
  )
  assert done.returncode == 1 and f"RuntimeError: denied: {HIDDEN}" in done.stderr
  assert "Traceback" in done.stderr and TOKEN not in done.stderr
