"""SkyPilot: a managed job, which it moves to other machines when its own are taken away."""

import math
from typing import Any

from bigtrain.config import Refused, config
from bigtrain.exit_codes import Exit
from bigtrain.launch.job import Command, Engine, Job, Rendered
from bigtrain.launch.jobset import PORT
from bigtrain.launch.script import FINAL, command, numbered, prepared
from bigtrain.launch.text import as_yaml

# How Google names accelerators, and by how much it counts a chip [cloud.google.com/tpu].
SLICES = {"v5e": ("tpu-v5litepod", 1), "v5p": ("tpu-v5p", 2), "v6e": ("tpu-v6e", 1)}
# It restarts all if the code of any host is a given one, and says this one of each host that it
# killed itself because another ended: after a refusal too. So it stands for no fault of its own.
ENDED_WITH_OTHERS = 137
FAULTS = [code for code in range(1, 256) if code not in (*FINAL, ENDED_WITH_OTHERS)]
RUN = """\
trap : TERM
{train}
code=$?
[ $code != {ended} ] || code={failed}
exit $code
"""


@config
class SkyPilot(Engine):
  """A managed job. SkyPilot restarts it after each code but the final ones, without a limit: it
  counts restarts only of codes that it cannot tell apart. `train` counts them (preflight.py)."""

  infra: str | None = None  # Where, as "gcp/us-east5" or "kubernetes"; anywhere unless given.
  image: str | None = None  # A container.
  spot: bool = False  # On machines that may be taken away.
  workdir: str | None = "."  # The folder here that each host gets a copy of; none in an image.
  runtime: str | None = None  # Of TPU VMs: their software, as "v2-alpha-tpuv6e".
  cpus: str | None = None  # Of a host, as "8+".
  memory: str | None = None  # Of a host, in GB, as "64+".

  def check(self, job: Job) -> None:
    if job.platform() == "tpu" and job.slices > 1:
      raise Refused(f"--slices {job.slices}: SkyPilot joins no slices; use jobset or gcloud")
    if self.runtime is not None and job.platform() != "tpu":
      raise Refused("--engine.runtime is of TPU VMs, and --chips names none")
    if "://" not in str(job.dir) and not str(job.dir).startswith("/"):
      raise Refused(
        f"--dir {job.dir}: this would go with the machine; name a bucket, or where one is mounted"
      )

  def render(self, job: Job, train: list[str], out: str, secrets: dict[str, str]) -> Rendered:
    found = numbered(
      f'"$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{PORT}"',
      '"$SKYPILOT_NUM_NODES"',
      '"$SKYPILOT_NODE_RANK"',
    )
    lines = [*prepared(job), *([] if job.platform() == "tpu" else found)]
    run = RUN.format(train=command(train), ended=ENDED_WITH_OTHERS, failed=int(Exit.FAILED))
    tree = {
      "name": job.name,
      "workdir": self.workdir,
      "num_nodes": 1
      if job.platform() == "tpu"
      else self.hosts(job),  # A slice is a node of several hosts.
      "resources": {
        "infra": self.infra,
        **_accelerators(job),
        "accelerator_args": {"runtime_version": self.runtime} if self.runtime else None,
        "cpus": self.cpus,
        "memory": self.memory,
        "use_spot": self.spot,
        "image_id": f"docker:{self.image}" if self.image else None,
        "job_recovery": {
          "strategy": "FAILOVER",
          "max_restarts_on_errors": 0,
          "recover_on_exit_codes": FAULTS,
        },
      },
      "run": "".join(f"{line}\n" for line in lines) + run,
    }
    path = f"{out}/{job.name}.sky.yaml"
    given = [word for name in job.secrets for word in ("--secret", name)]
    launch = ("sky", "jobs", "launch", "--yes", "--detach-run", *given, path)
    return Rendered({path: as_yaml(tree)}, (Command(launch),))


def _accelerators(job: Job) -> dict[str, Any]:
  if (there := job.topology()) is None:
    return {}
  kind = there.name.partition(":")[0]
  if job.platform() != "tpu":
    return {"accelerators": f"{kind.upper()}:{job.chips_of_host()}"}
  name, counted = SLICES[kind]
  return {"accelerators": f"{name}-{math.prod(there.shape) * counted}:1"}
