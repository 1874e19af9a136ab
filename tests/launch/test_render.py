"""What is rendered is what each engine takes, and nothing that is given breaks out of its words."""

import gzip
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from bigtrain.annotations import check_types
from bigtrain.cli import main
from bigtrain.config import Refused
from bigtrain.exit_codes import Exit
from bigtrain.launch import slurm
from bigtrain.launch.command import ENGINES as ENGINE_KINDS
from bigtrain.launch.job import Job
from bigtrain.launch.jobset import JobSet
from bigtrain.launch.remote import RECEIVE, Gcloud, Ssh
from bigtrain.launch.skypilot import SkyPilot
from bigtrain.launch.slurm import Slurm

GOLDEN = Path(__file__).parent.parent / "golden" / "launch_schemas.json.gz"
HOSTILE = "a'b\"c $(touch hacked) `touch hacked` $HOME; touch hacked & ${x} $$ \\ *"
TRAIN = ["bigtrain", "train", "experiments/quickstart.py", "--dir", HOSTILE, "--steps", "5"]


def job(engine, **fields) -> Job:
  made = Job(**{"engine": engine, "name": "study", "dir": "gs://bucket/study"} | fields)
  check_types(made)
  made.check()
  return made


def rendered(made: Job, secrets=None, train=TRAIN):
  return made.engine.render(made, train, "launched/study", secrets or {})


def tree(made: Job) -> dict:
  (text,) = rendered(made).files.values()
  return yaml.safe_load(text)


ENGINES = [
  Slurm(partition="long", time="1-0", image="image:1", cpus=16),
  JobSet(image="image:1", secret="tokens", claim="disk", queue="team", spot=True, cpus="500m"),
  SkyPilot(infra="gcp/us-east5", image="image:1", spot=True, cpus="8+", memory="64"),
  Ssh(machines=("me@a", "b"), options=("Port=2222",)),
  Gcloud(nodes=("pod",), zone="us-east5-a", project="mine", internal_ip=True),
]


def of_engine(engine, **fields) -> Job:
  chips = {"chips": "v5e:2x4", "hosts": 2} if isinstance(engine, Gcloud) else {}
  return job(engine, **chips, **fields)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_hostile_words_reach_the_command_as_they_are_and_run_nothing(engine, tmp_path):
  """The shell of a host is run, with a program in place of bigtrain that says what it was given."""
  (tmp_path / "bin").mkdir()
  put(tmp_path / "bin" / "bigtrain", 'printf "%s\\0" "$PWD" "$A" "$@"')
  folder = tmp_path / "it's $(here)"
  folder.mkdir()
  made = of_engine(engine, folder=str(folder), environment=(f"A={HOSTILE}",))
  script, stdin = _shell(made)
  process = subprocess.Popen(
    ["bash", "-c", script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    cwd=tmp_path,
    env={
      "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
      "HOME": "/nowhere",
      "JOB_INDEX": "1",
      "JOB_COMPLETION_INDEX": "0",
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NUM_NODES": "2",
      "SKYPILOT_NODE_RANK": "1",
    },
  )
  process.stdin.write(stdin)
  process.stdin.flush()
  assert process.wait(30) == 0
  given = process.communicate()[0].decode().split("\0")[:-1]
  assert given == [str(folder), HOSTILE, *TRAIN[1:]]
  assert not list(tmp_path.rglob("hacked"))


def put(path: Path, text: str) -> None:
  """A program."""
  path.write_text(f"#!/bin/bash\n{text}\n")
  path.chmod(0o755)


def _shell(made: Job) -> tuple[str, bytes]:
  """What the shell of a host is given, and what it reads."""
  if isinstance(made.engine, (Ssh, Gcloud)):
    command = rendered(made).commands[0]
    assert command.argv[-1] == RECEIVE
    return RECEIVE, command.stdin.encode()
  if isinstance(made.engine, Slurm):
    (text,) = rendered(made).files.values()
    return text[: text.index("\nsrun ")] + "\nhost", b""
  if isinstance(made.engine, SkyPilot):
    return tree(made)["run"], b""
  pod = tree(made)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  (script,) = pod["containers"][0]["command"][2:]
  return _expanded(script), b""


def _expanded(text: str) -> str:
  """As Kubernetes expands it: $$ is $, and $(NAME) the value of a variable, if there is one."""
  known = {"JOB_INDEX": "1", "HOME": "hacked"}
  found = lambda m: "$" if m[0] == "$$" else known.get(m[1], m[0])
  return re.sub(r"\$\$|\$\(([^)]*)\)", found, text)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
def test_no_engine_writes_a_secret_down(engine):
  made = of_engine(engine, secrets=("HF_TOKEN",))
  found = rendered(made, {"HF_TOKEN": "correct-horse"})
  assert not any("correct-horse" in text for text in found.files.values())
  assert not any("correct-horse" in word for each in found.commands for word in each.argv)
  if found.held:
    assert all("export HF_TOKEN=correct-horse" in each.stdin for each in found.commands)


def test_a_dry_run_prints_what_would_run_without_its_secrets(capsys, monkeypatch, tmp_path):
  monkeypatch.setenv("HF_TOKEN", "correct-horse")
  monkeypatch.chdir(tmp_path)
  study = str(GOLDEN.parent.parent.parent / "experiments" / "quickstart.py")
  where = ["--to", "ssh", "--engine.machines", "a", "b", "--secrets", "HF_TOKEN", "--dry_run"]
  assert main(["launch", study, *where, "--", "--steps", "7"]) == Exit.DONE
  out = capsys.readouterr().out
  assert "correct-horse" not in out and "export HF_TOKEN='***'" in out
  assert f"bigtrain train {study} --dir runs/quickstart --steps 7" in out
  assert out.count("$ ssh -o BatchMode=yes") == 2 and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def schemas():
  """A validator of each."""
  kind = pytest.importorskip("jsonschema").Draft202012Validator
  found = json.loads(gzip.decompress(GOLDEN.read_bytes()))
  return {name: kind(schema) for name, schema in found.items() if name != "from"}


CHIPS = [
  {},
  {"hosts": 3},
  {"chips": "v5e:4x4"},
  {"chips": "v5p:2x2x4"},
  {"chips": "v6e:4x4", "setup": "source venv/bin/activate\n"},
  {"chips": "h100:8", "slices": 2},
]


@pytest.mark.parametrize("chips", CHIPS, ids=str)
def test_job_sets_and_tasks_are_what_their_published_schemas_allow(schemas, chips):
  for engine in (JobSet(image="image:1"), ENGINES[1]):
    found = tree(job(engine, secrets=("A",) if engine.secret else (), **chips))
    schemas["jobset"].validate(found)
  found["spec"]["replicas"] = 3
  assert not schemas["jobset"].is_valid(found)
  for engine in (SkyPilot(), ENGINES[2]):
    found = tree(job(engine, **chips))
    schemas["skypilot_task"].validate(found)
    schemas["skypilot_resources"].validate(found["resources"])
  assert not schemas["skypilot_task"].is_valid(found | {"nodes": 3})


def test_a_job_set_recreates_all_but_what_was_refused():
  made = job(JobSet(image="image:1"), chips="v5p:2x2x4", slices=2)
  spec = tree(made)["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  (slices,) = spec["replicatedJobs"]
  of_job = slices["template"]["spec"]
  assert (slices["replicas"], of_job["parallelism"], of_job["completions"]) == (2, 4, 4)
  (rule,) = of_job["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 4, 126, 127])
  pod = of_job["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "2x2x4",
  }
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
  script = pod["containers"][0]["command"][2]
  assert (
    "BIGTRAIN_PROCESS" not in script and "MEGASCALE_NUM_SLICES:=2" in script
  )  # jax knows TPU hosts.


def test_skypilot_goes_on_after_each_code_but_those_of_a_refusal():
  recovery = tree(job(SkyPilot(), hosts=2))["resources"]["job_recovery"]
  assert recovery["max_restarts_on_errors"] == 0
  codes = set(recovery["recover_on_exit_codes"])
  # 137 is what SkyPilot says of the other hosts, of which one was refused.
  assert codes == set(range(1, 256)) - {Exit.REFUSED, Exit.CHECK, 126, 127, 137}


@pytest.mark.parametrize(
  "ends, code", [("exit 2", 2), ("kill -KILL $$", 1), ("kill -USR1 $$", 138)]
)
def test_a_killed_process_is_told_from_one_that_skypilot_ended(tmp_path, ends, code):
  put(tmp_path / "bigtrain", ends)
  script = tree(job(SkyPilot(), hosts=2))["run"]
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1"}
  assert subprocess.run(["bash", "-c", script], env=environment).returncode == code


@pytest.fixture
def on_slurm(tmp_path, monkeypatch):
  """Runs a batch script with two hosts, in place of SLURM; its code, and how often it requeued."""
  (tmp_path / "launched" / "study").mkdir(parents=True)
  of_hosts = """
for i in 0 1; do
  SLURM_PROCID=$i bash -c host
  code=$?
  [ $code -le ${highest:-0} ] || highest=$code
done
exit ${highest:-0}"""
  put(tmp_path / "srun", of_hosts)
  put(tmp_path / "squeue", "echo RUNNING")
  of_job = """
case $* in
  "update JobId=7 Requeue=0") touch final ;;
  "requeue 7") [ ! -e final ] && echo >> requeued ;;
esac"""
  put(tmp_path / "scontrol", of_job)
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}

  def run(made: Job) -> tuple[int, int]:
    (text,) = rendered(made).files.values()
    code = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment).returncode
    requeued = tmp_path / "requeued"
    return code, len(requeued.read_text().splitlines()) if requeued.exists() else 0

  return run


def test_slurm_counts_failed_starts_in_a_row_and_one_that_lasted_begins_anew(on_slurm, monkeypatch):
  fails = job(Slurm(), setup="exit 1", restarts=1)
  assert [on_slurm(fails), on_slurm(fails)] == [(1, 1), (1, 1)]
  monkeypatch.setattr(slurm, "LASTING", -1)
  assert [on_slurm(fails), on_slurm(fails)] == [(1, 2), (1, 3)]
  monkeypatch.undo()
  assert on_slurm(fails) == (1, 3)


@pytest.mark.parametrize(
  "setup, code, requeued",
  [
    ('[ "$SLURM_PROCID" = 0 ] || kill -KILL $$; exit 2', 137, 0),
    ('[ "$SLURM_PROCID" = 0 ] && kill -KILL $$; exit 4', 137, 0),
    ("exit 2", 2, 0),
    ("no_such_command; exit", 127, 0),
    ("kill -KILL $$", 137, 1),
    ("exit 3", 3, 1),
    ("exit 0", 0, 0),
  ],
)
def test_on_slurm_what_was_refused_on_one_host_is_not_requeued(on_slurm, setup, code, requeued):
  assert on_slurm(job(Slurm(), setup=setup)) == (code, requeued)


def test_a_container_without_scontrol_says_what_that_means(on_slurm, tmp_path, capfd):
  put(tmp_path / "srun", "PATH=/nowhere /bin/bash -c host")
  assert on_slurm(job(Slurm(), setup="exit 2")) == (2, 0)
  assert "code 2 is final, but there is no working scontrol" in capfd.readouterr().err


@pytest.mark.parametrize(
  "chips, slices, hosts, expected",
  [
    ("v5e:2x2", 1, None, 1),
    ("v5e:2x4", 1, None, 1),
    ("v5e:2x4", 1, 2, 2),
    ("v5e:4x4", 2, None, 8),
    ("v5p:2x2x4", 1, None, 4),
    ("v6e:16x16", 1, None, 64),
    ("h100:8", 4, None, 4),
    (None, 1, 3, 3),
    (None, 1, None, 1),
  ],
)
def test_hosts_follow_from_the_chips(chips, slices, hosts, expected):
  made = job(Slurm(), chips=chips, slices=slices, hosts=hosts)
  assert made.engine.hosts(made) == expected
  assert f"--nodes={expected}\n" in next(iter(rendered(made).files.values()))


def test_chips_are_what_each_process_is_told_to_find():
  two = {"chips": "h100:8", "slices": 2}
  for engine in (Slurm(), JobSet(image="image:1"), SkyPilot(), Ssh(machines=("a", "b"))):
    found = rendered(job(engine, **two))
    texts = [*found.files.values(), *(each.stdin or "" for each in found.commands)]
    assert any("export BIGTRAIN_DEVICES='gpu 16'" in text for text in texts)
  assert job(Slurm(), chips="v5e:2x4").variables() == {"BIGTRAIN_DEVICES": "tpu 8"}
  assert not job(Slurm(), hosts=2).variables()
  given = job(Slurm(), environment=("BIGTRAIN_DEVICES=cpu 2",), **two).variables()
  assert given == {"BIGTRAIN_DEVICES": "cpu 2"}


@pytest.mark.parametrize(
  "time", ["90", "90:30", "1:30:00", "2-0", "2-12:30", "2-00:00:00", "UNLIMITED", "infinite"]
)
def test_slurm_is_given_each_kind_of_time_that_it_takes(time):
  assert f"#SBATCH --time={time}\n" in next(iter(rendered(job(Slurm(time=time))).files.values()))


def test_plain_values_are_no_secrets():
  plain = ("TOKENIZERS_PARALLELISM=false", "NCCL_DEBUG=INFO", "XLA_FLAGS=--xla_a=true", "AUTHOR=me")
  assert len(job(Slurm(), environment=plain).variables()) == 4


@pytest.mark.parametrize(
  "engine, fields, message",
  [
    (Slurm(), {"name": "-x; rm"}, "a name at an engine is 40 lower-case letters"),
    (Slurm(), {"hosts": 0}, "--hosts 0: give 1 or more"),
    (Slurm(), {"chips": "v5e:4x4", "hosts": 3}, "are not that many equal parts"),
    (Slurm(), {"chips": "v9:4x4"}, "--chips v9:4x4: there is no chip 'v9'"),
    (Slurm(), {"chips": "h100"}, "--chips h100: give a number of chips, as in h100:8"),
    (Slurm(), {"environment": ("A B=1",)}, "give NAME=value"),
    (Slurm(), {"environment": ("HF_TOKEN=x",)}, "looks like a secret.*give --secrets HF_TOKEN"),
    (Slurm(), {"environment": ("PGPASSWORD=swordfish",)}, "looks like a secret"),
    (Slurm(), {"environment": ("APIKEY=abc",)}, "looks like a secret"),
    (Slurm(), {"environment": (f"MODEL=hf_{'a1' * 12}",)}, "looks like a secret"),
    (Slurm(), {"environment": ("STORE=s3://me:word@host",)}, "looks like a secret"),
    (Slurm(), {"restarts": -1}, "--restarts -1: give 0 or more"),
    (Slurm(), {"secrets": ("A=b",)}, "takes names of variables"),
    (Slurm(), {"command": "a 'b"}, "No closing quotation"),
    (Slurm(), {"command": ""}, "--command is empty"),
    (Slurm(), {"dir": "a\nb"}, "cannot be printed"),
    (Slurm(partition="a\n#SBATCH --wrap=x"), {}, "cannot be printed"),
    (Slurm(options=("--x",)), {}, "give options of sbatch"),
    (Slurm(time="2days"), {}, "--engine.time '2days' is no time of SLURM"),
    (Slurm(time="1:2:3:4"), {}, "is no time"),
    (Slurm(time="2-"), {}, "is no time"),
    (JobSet(), {}, "needs the image"),
    (JobSet(image="i", namespace="a b"), {}, "no name of Kubernetes"),
    (JobSet(image="i"), {"secrets": ("A",)}, "name the Secret that holds A"),
    (JobSet(image="i"), {"dir": "runs/x"}, "goes with it; name a bucket"),
    (SkyPilot(), {"chips": "v5e:4x4", "slices": 2}, "joins no slices"),
    (SkyPilot(), {"dir": "runs/x"}, "would go with the machine"),
    (SkyPilot(runtime="v2"), {}, "is of TPU VMs"),
    (Ssh(), {}, "name the hosts"),
    (Ssh(machines=("-oProxyCommand=x",)), {}, "is no host"),
    (Ssh(machines=("a", "a")), {}, "names a host twice"),
    (Ssh(machines=("a", "b")), {"hosts": 3}, "are 2, and the job has 3 hosts"),
    (Ssh(machines=("a",), port=0), {}, "give 1 to 65535"),
    (Gcloud(nodes=("a",), zone="z"), {}, "say which TPU VMs"),
    (Gcloud(nodes=("a",), zone="z"), {"chips": "v5e:4x4", "slices": 2}, "has 2 slices"),
    (Gcloud(nodes=("a", "a"), zone="z"), {"chips": "v5e:4x4", "slices": 2}, "a TPU VM twice"),
    (Gcloud(zone="z"), {"chips": "v5e:4x4"}, "are 0, and the job has 1 slice$"),
    (Gcloud(nodes=("--x",), zone="z"), {"chips": "v5e:4x4"}, "nodes '--x' is no name at Google"),
    (Gcloud(nodes=("a",)), {"chips": "v5e:4x4"}, "--engine.zone: say where"),
    (Gcloud(nodes=("a",), zone="Z"), {"chips": "v5e:4x4"}, "zone 'Z' is no name"),
    (Gcloud(nodes=("a",), zone="z", project=""), {"chips": "v5e:4x4"}, "project '' is no name"),
  ],
)
def test_what_cannot_be_is_refused(engine, fields, message):
  with pytest.raises(Refused, match=message):
    job(engine, **fields)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--to", "slrum"], "did you mean 'slurm'"),
    ([], "needs --to: slurm, jobset"),
    (["--to", "slurm", "--host", "2"], "did you mean --hosts"),
    (["--to", "slurm", "--engine.zone", "x"], "there is no flag --engine.zone"),
    (["--to", "slurm", "--", "--dir", "x"], "--dir is a field of the job"),
    (["--to", "slurm", "--", "--stepps", "x"], "did you mean --steps"),
    (["--to", "slurm", "--chips", "v5e:4x4", "--", "--mesh.fsdp", "3"], "16"),
    (
      ["--to", "ssh", "--engine.machines", "a", "--secrets", "NOT_SET"],
      "NOT_SET, which --secrets names",
    ),
    (["--to", "slurm", "--secrets", "A_TOKEN", "--dry_run"], "A_TOKEN, which --secrets names, is"),
    (["--to", "slurm", "--steps", "100"], "--steps is a flag of train: those come after a bare --"),
    (["--to", "slurm", "--mesh.no_ulysses"], "--mesh.no_ulysses is a flag of train"),
    (["--to", "nope.py:cluster"], "--to nope.py:cluster: there is no file nope.py, a function of"),
  ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, message, capsys, monkeypatch):
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something ran"))
  assert main(["launch", "experiments/quickstart.py", *arguments]) == Exit.REFUSED
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  "to, program, remedy",
  [
    (["slurm"], "sbatch", "on a login node"),
    (["skypilot", "--dir", "gs://bucket/run"], "sky", "uv tool install --with pip 'skypilot["),
    (["ssh", "--engine.machines", "a"], "ssh", "OpenSSH"),
  ],
)
def test_a_command_that_is_not_here_is_refused_with_its_remedy(
  to, program, remedy, capsys, monkeypatch, tmp_path
):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert main(["launch", "experiments/quickstart.py", "--to", *to]) == Exit.REFUSED
  said = capsys.readouterr().err
  assert f"there is no {program} here" in said and remedy in said


def test_a_secret_that_kubernetes_holds_need_not_be_set_here(capsys, monkeypatch):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  to = ["--to", "jobset", "--engine.image", "i", "--engine.secret", "s", "--dir", "gs://bucket/run"]
  secret = ["--secrets", "HF_TOKEN", "--dry_run"]
  assert main(["launch", "experiments/quickstart.py", *to, *secret]) == Exit.DONE
  assert "secretKeyRef" in capsys.readouterr().out


@pytest.mark.parametrize("to", sorted(ENGINE_KINDS))
def test_every_flag_says_what_it_is(to, capsys):
  with pytest.raises(SystemExit):
    main(["launch", "experiments/quickstart.py", "--to", to, "--help"])
  text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
  flags = re.findall(r"(?<= )(--[a-z_.]+)(?:, --[a-z_.]+)? ([^(]*)\(default", text)
  assert len(flags) > 15
  nothing = r"(\{None\}\|)?(STR|INT|FLOAT)? ?(\[STR \[STR \.\.\.\]\])? ?"
  assert [flag for flag, about in flags if re.fullmatch(nothing, about)] == []


def test_a_job_may_stand_in_a_file_and_flags_change_it(tmp_path, capsys):
  (tmp_path / "machines.py").write_text(
    "from bigtrain.launch.job import Job\n"
    "from bigtrain.launch.slurm import Slurm\n\n\n"
    "def cluster() -> Job:\n"
    '  return Job(engine=Slurm(partition="long", account="us"), hosts=8)\n'
  )
  to = ["--to", f"{tmp_path}/machines.py:cluster", "--engine.account", "them", "--dry_run"]
  assert main(["launch", "experiments/quickstart.py:base", *to]) == Exit.DONE
  out = capsys.readouterr().out
  for line in ("--partition=long", "--account=them", "--nodes=8", "--job-name=quickstart"):
    assert f"#SBATCH {line}\n" in out
  assert shlex.split(out.splitlines()[-1]) == [
    "$",
    "sbatch",
    "launched/quickstart/quickstart.sbatch",
  ]
