"""Plain hosts through ssh, and TPU VMs through gcloud: processes that the launcher holds.

Each host gets its script on standard input, so that no secret is in a list of processes. What
follows the script is silence, and its end a lease that ran out: when the launcher goes, or the
network, the host asks its process to save and leave.
"""

import dataclasses
import re

from bigtrain.config import Refused, config
from bigtrain.launch.job import Command, Engine, Job, Rendered
from bigtrain.launch.script import command, exports, numbered, prepared, quoted

UNREACHED = 255  # As ssh says it.
# Reads up to the NUL byte after the script. gcloud connects again when it is cut off, and then
# there is nothing left to read.
RECEIVE = f'exec bash -c \'IFS= read -r -d "" script || exit {UNREACHED}; eval "$script"\''
SCRIPT = """\
set -m
exec 3<&0 </dev/null
{lines}# Where nobody listens any more, tee reads on, so that no word of a process is its last.
{train} 3<&- > >(exec tee -p /dev/null) 2>&1 &
child=$!
(
  cat <&3 >/dev/null
  kill -TERM "$child"
  sleep {grace}
  kill -KILL -- "-$child"
) >/dev/null 2>&1 &
lease=$!
disown "$lease"
set +m
wait "$child"
code=$?
kill -KILL -- "-$lease" 2>/dev/null
exit "$code"
"""


@config
class Held(Engine):
  """Processes that the launcher starts, watches and starts again."""

  pause: float = 5.0  # Seconds before the first restart; each later one waits twice as long.

  def check(self, job: Job) -> None:
    if self.pause < 0:
      raise Refused(f"--engine.pause {self.pause}: give 0 or more")

  def rendered(
    self,
    job: Job,
    train: list[str],
    secrets: dict[str, str],
    reach: dict[str, tuple[str, ...]],
    found: list[list[str]],
  ) -> Rendered:
    """The process of each host: the command that reaches it by name, lines of its own."""
    commands = []
    for (name, argv), own in zip(reach.items(), found, strict=True):
      lines = [*exports(secrets), *prepared(job), *own]
      script = SCRIPT.format(
        lines="".join(f"{line}\n" for line in lines), train=command(train), grace=job.grace
      )
      commands.append(Command((*argv, RECEIVE), f"{script}\0", name))
    return Rendered({}, tuple(commands), held=True)


@config
class Ssh(Held):
  """Hosts that ssh reaches without a question. The first is where the others find each other."""

  machines: tuple[str, ...] = ()  # As ssh takes them: "user@10.0.0.1".
  options: tuple[str, ...] = ()  # Of ssh, as -o takes them: "Port=2222".
  address: str | None = None  # Of the first one for the others; as in `machines` unless given.
  port: int = 8476  # There.

  def hosts(self, job: Job) -> int:
    return len(self.machines)

  def check(self, job: Job) -> None:
    Held.check(self, job)
    if not self.machines:
      raise Refused("--engine.machines: name the hosts, as --engine.machines a b")
    if len(set(self.machines)) < len(self.machines):
      raise Refused("--engine.machines names a host twice: a host runs one process")
    for name in self.machines:
      if not name or name.startswith("-") or not name.isprintable():
        raise Refused(f"--engine.machines {name!r} is no host that ssh could reach")
    if not 0 < self.port < 65536:
      raise Refused(f"--engine.port {self.port}: give 1 to 65535")
    wanted = job.slices * job.hosts_of_slice()
    if (job.chips or job.hosts) and wanted != len(self.machines):
      raise Refused(f"--engine.machines are {len(self.machines)}, and the job has {wanted} hosts")

  def render(self, job: Job, train: list[str], out: str, secrets: dict[str, str]) -> Rendered:
    options = ("BatchMode=yes", "ServerAliveInterval=15", "ServerAliveCountMax=4", *self.options)
    given = [word for option in options for word in ("-o", option)]
    first = self.machines[0].rpartition("@")[2] if self.address is None else self.address
    coordinator, n = quoted(f"{first}:{self.port}"), str(len(self.machines))
    return self.rendered(
      job,
      train,
      secrets,
      {name: ("ssh", *given, "--", name) for name in self.machines},
      [numbered(coordinator, n, str(i)) for i in range(len(self.machines))],
    )


@config
class Gcloud(Held):
  """The hosts of TPU VMs, which find each other."""

  nodes: tuple[str, ...] = ()  # The TPU VM of each slice, by name.
  zone: str = ""  # Where they are, as us-east5-a.
  project: str | None = None  # gcloud's own unless given.
  internal_ip: bool = False  # Reach them inside their network.

  def check(self, job: Job) -> None:
    Held.check(self, job)
    if job.platform() != "tpu":
      raise Refused("--chips: say which TPU VMs these are, as --chips v5e:4x4")
    if len(self.nodes) != job.slices:
      slices = f"{job.slices} slice{'s' * (job.slices > 1)}"
      raise Refused(f"--engine.nodes are {len(self.nodes)}, and the job has {slices}")
    if len(set(self.nodes)) < len(self.nodes):
      raise Refused("--engine.nodes names a TPU VM twice: each is one slice")
    if not self.zone:
      raise Refused("--engine.zone: say where the TPU VMs are, as --engine.zone us-east5-a")
    given = [("nodes", node) for node in self.nodes] + [("zone", self.zone)]
    given += [] if self.project is None else [("project", self.project)]
    for field, value in given:
      if not re.fullmatch(r"[a-z][-a-z0-9:.]*", value):
        raise Refused(f"--engine.{field} {value!r} is no name at Google")

  def render(self, job: Job, train: list[str], out: str, secrets: dict[str, str]) -> Rendered:
    where = ["--zone", self.zone, *(["--project", self.project] if self.project else [])]
    where += ["--internal-ip"] if self.internal_ip else []
    begin = ("gcloud", "compute", "tpus", "tpu-vm")
    reach = {
      f"{node}/{worker}": (
        *(*begin, "ssh", node, *where, "--quiet"),
        *("--worker", str(worker), "--command"),
      )
      for node in self.nodes
      for worker in range(job.hosts_of_slice())
    }
    # Without a login, or with a wrong name, its ssh ends with code 1, as a run that failed does.
    checks = [Command((*begin, "describe", node, *where, "--quiet")) for node in self.nodes]
    made = self.rendered(job, train, secrets, reach, [[] for _ in reach])
    return dataclasses.replace(made, checks=tuple(checks))
