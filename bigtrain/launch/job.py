"""What runs on which machines: one small description, which an engine renders."""

import dataclasses
import math
import re
import shlex
from typing import ClassVar

from bigtrain.config import Refused, config
from bigtrain.plan.topologies import Topology, topology
from bigtrain.secrets import is_secret

NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # What Kubernetes, the strictest, takes, with room.
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
# What `train` is told in the environment (preflight.py): the devices of all processes, "gpu 16";
# and which launch this is, with how often it may go on from no newer checkpoint, "3fa9c1d2 100".
DEVICES, LAUNCH = "BIGTRAIN_DEVICES", "BIGTRAIN_LAUNCH"
FULL_HOST = 8  # Chips of a v5e or v6e host that is a whole slice; of a larger slice it has 4.


@dataclasses.dataclass(frozen=True)
class Command:
  """What the launcher runs: a command, what it reads on standard input, whose output it is."""

  argv: tuple[str, ...]
  stdin: str | None = None
  name: str = ""


@dataclasses.dataclass(frozen=True)
class Rendered:
  """What an engine makes of a job.

  `files` lie in the folder of `--out` when the commands run. Several commands, or one that is
  `held`, are the processes of the run, which the launcher restarts; else the engine does. Unless
  all `checks` end well before the first start, no process could be reached.
  """

  files: dict[str, str]
  commands: tuple[Command, ...]
  held: bool = False
  checks: tuple[Command, ...] = ()


@config
class Engine:
  """What starts a job, and starts it again."""

  keeps_secrets: ClassVar[bool] = False  # It has their values; else they are those set here.

  def render(self, job: "Job", train: list[str], out: str, secrets: dict[str, str]) -> Rendered:
    """What would run.

    Args:
      job: the description.
      train: the training command, as each host runs it.
      out: the folder in which the files will lie.
      secrets: the values of `job.secrets`, for an engine that has no place of its own for them.
    """
    raise NotImplementedError

  def hosts(self, job: "Job") -> int:
    """How many there are together: by the chips, else as many as `job.hosts` says."""
    return job.slices * job.hosts_of_slice()

  def check(self, job: "Job") -> None:
    """Refuses what this engine cannot do."""


@config
class Job:
  """What runs where. Everything is the same on every host.

  A host runs one process, which takes all of its chips.
  """

  engine: Engine
  name: str | None = None  # At its engine; that of the run directory unless given.
  dir: str | None = None  # Run directory that all hosts see, or a bucket; that of `train` if None.
  chips: str | None = None  # Of a slice, as `plan` names them: v5e:4x4, v5p:2x2x4, h100:8.
  slices: int = 1  # Such slices; of GPUs, hosts.
  hosts: int | None = None  # Of a slice; by the chips, else 1, unless given.
  folder: str | None = None  # Where on a host the code lies; where the engine begins unless given.
  setup: str = ""  # Lines of shell before the command, as `source venv/bin/activate`.
  command: str = "bigtrain"  # How a host calls it: "uv run bigtrain", "python -m bigtrain.cli".
  environment: tuple[str, ...] = ()  # NAME=value of each further variable; nothing secret.
  secrets: tuple[str, ...] = ()  # Variables whose values are known here and written nowhere.
  compiled: str | None = None  # A folder or bucket of compiled programs that all hosts share.
  grace: int = 120  # Seconds to save once told to leave; and for others, when one process ended.
  restarts: int = 100  # How often in a row it goes on from no newer checkpoint; then it ends.

  def topology(self) -> Topology | None:
    return None if self.chips is None else topology(self.chips, self.slices, "--chips")

  def platform(self) -> str | None:
    """ "tpu" or "gpu", None where no chips are named."""
    there = self.topology()
    return None if there is None else there.chip.platform

  def hosts_of_slice(self) -> int:
    """Hosts of one slice.

    Raises:
      Refused: `hosts` does not fit the chips.
    """
    if (there := self.topology()) is None:
      return 1 if self.hosts is None else self.hosts
    chips = math.prod(there.shape)
    kind = there.name.partition(":")[0]
    if there.chip.platform == "gpu":
      usual = 1
    else:
      usual = 1 if chips <= (4 if kind == "v5p" else FULL_HOST) else math.ceil(chips / 4)
    hosts = usual if self.hosts is None else self.hosts
    if chips % hosts:
      raise Refused(
        f"--hosts {hosts}: the {chips} chips of {self.chips} are not that many equal parts"
      )
    return hosts

  def chips_of_host(self) -> int:
    """Chips of one host, 0 where no chips are named."""
    there = self.topology()
    return 0 if there is None else math.prod(there.shape) // self.hosts_of_slice()

  def variables(self) -> dict[str, str]:
    """The environment: what was given, the place of compiled programs, the devices to be found."""
    there = self.topology()
    found = {} if there is None else {DEVICES: f"{there.chip.platform} {there.chips}"}
    found |= dict(each.split("=", 1) for each in self.environment)
    return found | ({"JAX_COMPILATION_CACHE_DIR": self.compiled} if self.compiled else {})

  def check(self) -> None:
    """Refuses what no engine can do, and then what this one cannot."""
    if not re.fullmatch(NAME, str(self.name)):
      raise Refused(
        f"--name {self.name}: a name at an engine is 40 lower-case letters, digits and dashes at "
        "most, the first of them a letter"
      )
    for what, value in {"hosts": self.hosts, "slices": self.slices, "grace": self.grace}.items():
      if value is not None and value < 1:
        raise Refused(f"--{what} {value}: give 1 or more")
    if self.restarts < 0:
      raise Refused(f"--restarts {self.restarts}: give 0 or more")
    for each in self.environment:
      name, equals, value = each.partition("=")
      if not equals or not re.fullmatch(VARIABLE, name):
        raise Refused(f"--environment: give NAME=value for each, not {name!r}")
      if is_secret(name, value):
        raise Refused(
          f"--environment {name}=...: this looks like a secret, which would be written down; set "
          f"{name} where you launch, and give --secrets {name}"
        )
    for name in self.secrets:
      if not re.fullmatch(VARIABLE, name):
        raise Refused("--secrets takes names of variables; their values come from the environment")
    try:
      words = shlex.split(self.command)
    except ValueError as error:
      raise Refused(f"--command {self.command!r}: {error}") from error
    if not words:
      raise Refused("--command is empty: say how a host calls bigtrain")
    lines = {"dir": self.dir, "folder": self.folder, "compiled": self.compiled}
    for what, value in lines.items():
      if value is not None and not value.isprintable():
        raise Refused(f"--{what} {value!r} holds a character that cannot be printed")
    self.hosts_of_slice()
    self.engine.check(self)
