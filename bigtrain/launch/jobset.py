"""GKE and other Kubernetes: a JobSet, which recreates all pods when one of them fails.

A job of the set is a slice. GKE tells TPU hosts of a slice of each other, and jax listens to it.
For slices, and for all other hosts, the set's own network names the first one.
"""

import re
from typing import Any, ClassVar

from bigtrain.config import Refused, config
from bigtrain.launch.job import Command, Engine, Job, Rendered
from bigtrain.launch.script import FINAL, command, numbered, prepared
from bigtrain.launch.text import as_yaml

PORT = 8476
# JobSet counts all restarts and never begins anew. A fault every four hours takes years to reach
# this; who counts in a row is `train` itself (preflight.py), by the run's checkpoints.
RESTARTS = 10_000
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
# By kind of chip: of Google's node labels, the one that names it; and the resource.
NODES = {
  "v5e": ("cloud.google.com/gke-tpu-accelerator", "tpu-v5-lite-podslice", "google.com/tpu"),
  "v5p": ("cloud.google.com/gke-tpu-accelerator", "tpu-v5p-slice", "google.com/tpu"),
  "v6e": ("cloud.google.com/gke-tpu-accelerator", "tpu-v6e-slice", "google.com/tpu"),
  "h100": ("cloud.google.com/gke-accelerator", "nvidia-h100-80gb", "nvidia.com/gpu"),
}


@config
class JobSet(Engine):
  """A JobSet of Kubernetes, made by kubectl. Needs the JobSet controller, 0.6 or newer."""

  keeps_secrets: ClassVar[bool] = True

  image: str = ""  # The container, with the code in it.
  namespace: str = "default"  # Of Kubernetes.
  queue: str | None = None  # Of Kueue.
  account: str | None = None  # Kubernetes' service account, as for access to a bucket.
  secret: str | None = None  # The Secret that holds `secrets` under their names.
  claim: str | None = None  # A persistent volume claim that all hosts can write.
  mount: str = "/shared"  # Where that volume is.
  spot: bool = False  # On nodes that may be taken away.
  cpus: str | None = None  # Of a host, as "8" or "500m".
  memory: str | None = None  # Of a host, as "64Gi".

  def check(self, job: Job) -> None:
    if not self.image:
      raise Refused("--engine.image: a JobSet needs the image of a container")
    if job.secrets and self.secret is None:
      raise Refused(
        "--engine.secret: name the Secret that holds "
        f"{', '.join(job.secrets)}, as made by kubectl create secret generic"
      )
    names = (self.namespace, self.queue, self.account, self.secret, self.claim)
    if wrong := [name for name in names if name is not None and not re.fullmatch(LABEL, name)]:
      raise Refused(f"{wrong[0]!r} is no name of Kubernetes: letters, digits, dashes and dots")
    inside = self.claim is not None and str(job.dir).startswith(f"{self.mount.rstrip('/')}/")
    if "://" not in str(job.dir) and not inside:
      raise Refused(
        f"--dir {job.dir}: what a pod writes goes with it; name a bucket, or a folder under "
        f"{self.mount} with --engine.claim"
      )

  def render(self, job: Job, train: list[str], out: str, secrets: dict[str, str]) -> Rendered:
    name = str(job.name)
    hosts = job.hosts_of_slice()
    labels = {} if self.queue is None else {"kueue.x-k8s.io/queue-name": self.queue}
    rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(FINAL)}}
    job_spec = {
      "parallelism": hosts,
      "completions": hosts,
      "backoffLimit": 0,
      "podFailurePolicy": {"rules": [rule]},
      "template": {"spec": self._pod(job, train)},
    }
    tree = {
      "apiVersion": "jobset.x-k8s.io/v1alpha2",
      "kind": "JobSet",
      "metadata": {
        "name": name,
        "namespace": self.namespace,
        "labels": labels or None,
        "annotations": _exclusive(job),
      },
      "spec": {
        "failurePolicy": {
          "maxRestarts": RESTARTS,
          # What was refused once is refused again; all else is restarted.
          "rules": [
            {
              "name": "refused",
              "action": "FailJobSet",
              "onJobFailureReasons": ["PodFailurePolicy"],
            }
          ],
        },
        "replicatedJobs": [
          {"name": "slice", "replicas": job.slices, "template": {"spec": job_spec}}
        ],
      },
    }
    path = f"{out}/{name}.jobset.yaml"
    return Rendered({path: as_yaml(tree)}, (Command(("kubectl", "create", "-f", path)),))

  def _pod(self, job: Job, train: list[str]) -> dict[str, Any]:
    """The pod of a host."""
    lines = [*prepared(job), *self._found(job), f"exec {command(train)}"]
    resources = {"cpu": self.cpus, "memory": self.memory, **_chips(job)}
    given = {name: amount for name, amount in resources.items() if amount is not None}
    container = {
      "name": "train",
      "image": self.image,
      "command": ["bash", "-c", unexpanded("\n".join(lines) + "\n")],
      "env": self._variables(job),
      "ports": None if job.platform() == "tpu" else [{"containerPort": PORT}],
      "resources": {"requests": given, "limits": given} if given else None,
      "volumeMounts": [{"name": "shared", "mountPath": self.mount}] if self.claim else None,
    }
    volume = {"name": "shared", "persistentVolumeClaim": {"claimName": self.claim}}
    spot = {"cloud.google.com/gke-spot": "true"} if self.spot else {}
    return {
      "restartPolicy": "Never",
      "terminationGracePeriodSeconds": job.grace,
      "serviceAccountName": self.account,
      "nodeSelector": _nodes(job) | spot or None,
      "containers": [container],
      "volumes": [volume] if self.claim else None,
    }

  def _variables(self, job: Job) -> list[dict[str, Any]]:
    """What Kubernetes puts in the environment."""
    index = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    return [
      {"name": "JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": index}}},
      *(
        {"name": name, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": name}}}
        for name in job.secrets
      ),
    ]

  def _found(self, job: Job) -> list[str]:
    """Lines by which processes find each other."""
    first = f"{job.name}-slice-0-0.{job.name}"
    if job.platform() != "tpu":
      process = f"$((JOB_INDEX * {job.hosts_of_slice()} + JOB_COMPLETION_INDEX))"
      return numbered(f"{first}:{PORT}", self.hosts(job), process)
    if job.slices == 1:
      return []
    # Whatever the cluster does not set itself.
    return [
      f": ${{MEGASCALE_NUM_SLICES:={job.slices}}} ${{MEGASCALE_SLICE_ID:=$JOB_INDEX}}",
      f": ${{MEGASCALE_COORDINATOR_ADDRESS:={first}}}",
      "export MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID MEGASCALE_COORDINATOR_ADDRESS",
    ]


def _nodes(job: Job) -> dict[str, str]:
  """Labels of the nodes that have the chips."""
  if (there := job.topology()) is None:
    return {}
  kind, _, shape = there.name.partition(":")
  label, value, _ = NODES[kind]
  grid = {"cloud.google.com/gke-tpu-topology": shape} if job.platform() == "tpu" else {}
  return {label: value, **grid}


def _chips(job: Job) -> dict[str, str]:
  """The chips of a host, as a resource."""
  if (there := job.topology()) is None:
    return {}
  _, _, resource = NODES[there.name.partition(":")[0]]
  return {resource: str(job.chips_of_host())}


def _exclusive(job: Job) -> dict[str, str] | None:
  """A slice has its node pool for itself."""
  pool = "cloud.google.com/gke-nodepool"
  return {"alpha.jobset.sigs.k8s.io/exclusive-topology": pool} if job.platform() == "tpu" else None


def unexpanded(text: str) -> str:
  """A text in which Kubernetes finds no $(NAME) to put a variable's value in."""
  return re.sub(r"\$(?=[$(])", "$$", text)
