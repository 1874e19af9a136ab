"""Makes tests/golden/launch_schemas.json.gz: what JobSet and SkyPilot take, as JSON schemas.

    python -m venv v && v/bin/pip install skypilot==0.14.1 kubeflow-trainer-api==2.3.0
    v/bin/python tools/golden/make_launch_schemas.py

Both packages are Apache-2.0. SkyPilot's are its own schemas, by which it checks a task file
(sky/utils/schemas.py). JobSet's is that of the models which Kubeflow makes from JobSet's OpenAPI
(v1alpha2), with all of Kubernetes' pods in it; as the API server does when it is strict, it refuses
names that it does not know. Titles and descriptions are dropped.
"""

import gzip
import importlib.metadata
import json
from pathlib import Path

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from sky.utils import schemas

TARGET = Path(__file__).parent.parent.parent / "tests" / "golden" / "launch_schemas.json.gz"
# Numbers or text in JSON, but classes of their own in the models.
EITHER = ("IoK8sApimachineryPkgApiResourceQuantity", "IoK8sApimachineryPkgUtilIntstrIntOrString")


def bare(tree, *, closed: bool):
  """A schema without words; `closed` ones refuse unknown names."""
  if isinstance(tree, list):
    return [bare(item, closed=closed) for item in tree]
  if not isinstance(tree, dict):
    return tree
  # A field may itself be called title or description: then its value is a schema.
  kept = {k: v for k, v in tree.items() if not (k in ("title", "description") and type(v) is str)}
  found = {k: bare(v, closed=closed) for k, v in kept.items()}
  if closed and "properties" in found and found.get("type") == "object":
    found["additionalProperties"] = False
  return found


def main() -> None:
  packages = ("skypilot", "kubeflow-trainer-api")
  jobset = bare(JobsetV1alpha2JobSet.model_json_schema(by_alias=True), closed=True)
  jobset["$defs"] |= {name: {"type": ["number", "string"]} for name in EITHER}
  found = {
    "from": {name: importlib.metadata.version(name) for name in packages},
    "jobset": jobset,
    "skypilot_task": bare(schemas.get_task_schema(), closed=False),
    "skypilot_resources": bare(schemas.get_resources_schema(), closed=False),
  }
  text = json.dumps(found, sort_keys=True, separators=(",", ":"))
  TARGET.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
  main()
