"""SLURM: a batch script that requeues itself."""

import re
import shlex

from bigtrain.config import Refused, config
from bigtrain.launch.job import Command, Engine, Job, Rendered
from bigtrain.launch.script import FINAL, LASTING, command, prepared, quoted

SCRIPT = """\
#!/bin/bash
{options}

# What each host runs. SIGTERM comes to it and to bigtrain, of which it has to hear how it left.
# srun returns the signal of a host that it killed rather than the code of one that was refused: so
# that one takes the job's right to be requeued away.
host() {{
trap : TERM
trap '
  code=$?
  case $code in {final})
    scontrol update "JobId=$SLURM_JOB_ID" Requeue=0 ||
      echo "bigtrain: code $code is final, but there is no working scontrol to say so" >&2
  esac
' EXIT
{lines}{train}
}}
export -f host

srun --kill-on-bad-exit=0 --wait={grace}{more} bash -c host
code=$?
case $code in 0|{final}) exit $code ;; esac
# Starts in a row that ended soon; SLURM's own count never begins anew.
row={out}/$SLURM_JOB_ID.row
failed=$(($(cat "$row" 2> /dev/null || echo 0) + 1))
[ $SECONDS -le {lasting} ] || failed=1
if [ $failed -gt {restarts} ]; then
  echo "bigtrain: ended with code $code, and was restarted {restarts} times in a row" >&2
  exit $code
fi
# A job that was cancelled stays so.
if [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
  echo "bigtrain: ended with code $code; requeued" >&2
  echo $failed > "$row"
  scontrol requeue "$SLURM_JOB_ID" ||
    echo "bigtrain: not requeued: the code of a host was final" >&2
fi
exit $code
"""
# As sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds; after "days-" it begins with
# hours.
TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE"


@config
class Slurm(Engine):
  """A batch job that SLURM requeues when a node fails, and that requeues itself when it ends early.

  Its environment is that of who launches, as SLURM has it.
  """

  partition: str | None = None  # The cluster's default unless given.
  account: str | None = None  # Who is charged; your default unless given.
  qos: str | None = None  # Quality of service; the account's default unless given.
  time: str | None = None  # Limit of one start, as "2-00:00:00"; SIGTERM comes `grace` before it.
  cpus: int | None = None  # Of a host; those that the partition gives to a task unless given.
  image: str | None = None  # A container, where the cluster has pyxis.
  options: tuple[str, ...] = ()  # More of sbatch, without dashes: "constraint=h100".

  def check(self, job: Job) -> None:
    for value in (self.partition, self.account, self.qos, self.time, self.image, *self.options):
      if value is not None and not value.isprintable():
        raise Refused(f"{value!r} holds a character that cannot be printed")
    if wrong := [each for each in self.options if not re.match("[a-z]", each)]:
      raise Refused(f"--engine.options {wrong[0]!r}: give options of sbatch, as constraint=h100")
    if self.time is not None and not re.fullmatch(TIME, self.time, re.IGNORECASE):
      raise Refused(
        f"--engine.time {self.time!r} is no time of SLURM: give minutes, hours:minutes:seconds, or "
        "days-hours:minutes:seconds, as 2-00:00:00"
      )
    if self.cpus is not None and self.cpus < 1:
      raise Refused(f"--engine.cpus {self.cpus}: give 1 or more")

  def render(self, job: Job, train: list[str], out: str, secrets: dict[str, str]) -> Rendered:
    options = {
      "job-name": str(job.name),
      "nodes": str(self.hosts(job)),
      "ntasks-per-node": "1",
      "cpus-per-task": str(self.cpus) if self.cpus else None,
      "partition": self.partition,
      "account": self.account,
      "qos": self.qos,
      "time": self.time,
      "gpus-per-node": str(job.chips_of_host()) if job.platform() == "gpu" else None,
      "signal": f"TERM@{job.grace}",
      "output": f"{out.replace('%', '%%')}/%j.log",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    given += ["--requeue", "--open-mode=append", "--export=ALL"]
    given += [f"--{option}" for option in self.options]
    more = [f"--cpus-per-task={self.cpus}"] if self.cpus else []  # srun does not inherit it.
    more += [f"--container-image={shlex.quote(self.image)}"] if self.image else []
    text = SCRIPT.format(
      options="\n".join(f"#SBATCH {shlex.quote(option)}" for option in given),
      lines="".join(f"{line}\n" for line in prepared(job)),
      train=command(train),
      final="|".join(map(str, FINAL)),
      out=quoted(out),
      lasting=LASTING,
      grace=job.grace,
      more="".join(f" {option}" for option in more),
      restarts=job.restarts,
    )
    script = f"{out}/{job.name}.sbatch"
    return Rendered({script: text}, (Command(("sbatch", script)),))
