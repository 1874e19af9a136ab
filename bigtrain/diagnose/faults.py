"""What went wrong outside of learning: updates that were not applied, ends, hangs, bad machines.

All of it was told when it happened, in a line among thousands, perhaps to nobody.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from bigtrain.diagnose.records import Finding, Records

OFTEN = 0.01  # Share of the steps.
SLOW = 3  # Times that a process was named as slow.
REMEDIES = {
  "data": "Look at the batch, and take such examples out of the data",
  "precision": "Compute in more bits (dtype float32, products None)",
  "optimizer": "Lower the learning rate, lengthen the warm-up, or clip the gradient",
  "hardware": "Take that device out of the job",
}
UNKNOWN = (
  "Look at incident.json and the batch there; lower the learning rate if it began to diverge"
)
ENDINGS = ("end", "left", "error", "hang")


def _of(r: Records, name: str) -> list[dict[str, Any]]:
  return [event for event in r.events if event["event"] == name]


def faults(r: Records) -> Iterator[Finding]:
  # Behind a restart the same one may be met again.
  if not (found := list({e.get("step"): e for e in _of(r, "incident")}.values())):
    return
  causes: Counter[str] = Counter(str(e.get("cause")) for e in found)
  cause = next((c for c, _ in causes.most_common() if c in REMEDIES), "unknown")
  told = next(e for e in found if cause in (e.get("cause"), "unknown"))
  first = f", the first bad tensor is {told['first_bad']}" if told.get("first_bad") else ""
  where = f" ({told['path']})" if told.get("path") else ""
  steps = [e.get("step") for e in found]
  which = (
    f"that of step {steps[0]}" if len(found) == 1 else f"{len(found)}, the last at {steps[-1]}"
  )
  yield Finding(
    "updates not applied",
    f"{which}; the cause of step {told.get('step')} is {told.get('cause')}{first}{where}",
    REMEDIES.get(cause, UNKNOWN),
    severity="trouble" if len(found) > OFTEN * r.train["step"][-1] else "advice",
    explains=("divergence",),
  )


def failed(r: Records) -> Iterator[Finding]:
  starts = [i for i, event in enumerate(r.events) if event["event"] == "start"]
  endings = [e for e in r.events[starts[-1] if starts else 0 :] if e["event"] in ENDINGS]
  if endings and endings[-1]["event"] == "error":
    what = str(endings[-1].get("error")).split("\n")[0][:300]
    yield Finding(
      "failed",
      f"the last start ended at step {r.train['step'][-1]:.0f} with {what}",
      "The same command goes on from the newest checkpoint, once that is mended",
    )


def hangs(r: Records) -> Iterator[Finding]:
  if found := _of(r, "hang"):
    phases = Counter(e.get("phase") for e in found)
    told = ", ".join(f"{n} in {phase}" for phase, n in phases.most_common(4))
    yield Finding(
      "hangs",
      f"{len(found)} {'time' if len(found) == 1 else 'times'} a deadline passed: {told}",
      "hangs/ has what every thread did; raise --deadlines of that phase if it only takes longer",
    )


def bad_machines(r: Records) -> Iterator[Finding]:
  for event in _of(r, "bad_device")[-1:]:
    yield Finding(
      "bad device",
      f"at step {event.get('step')} {event.get('found')}",
      "Take it out of the job",
    )
  if damaged := _of(r, "damaged"):
    yield Finding(
      "damaged checkpoints",
      f"{len(damaged)} were set aside, the last of step {damaged[-1].get('step')}: "
      f"{str(damaged[-1].get('why'))[:200]}",
      "Look at the disk or the memory of the hosts that wrote them",
    )
  slow = Counter(e.get("process") for e in _of(r, "straggler"))
  for process, n in slow.most_common(1):
    if n >= SLOW:
      yield Finding(
        "slow host",
        f"process {process} was {n} times slower than the others",
        "Look at what else runs on its host, and at its chips' temperature; or replace it",
        severity="advice",
      )
