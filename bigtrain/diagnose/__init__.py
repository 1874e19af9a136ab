"""Diagnosis: what a run's records say about its health, in sentences with evidence and a remedy.

It reads metrics.jsonl and events.jsonl alone, so it works while a run trains and after it failed.
Thresholds are set so that a healthy run is told nothing; docs/diagnose.md says how that was judged.

A check is a public function of a module in this folder that is annotated `Iterator[Finding]`: a new
one is found where it stands.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator

from bigtrain.diagnose.records import Finding, Records, read

__all__ = ["Finding", "Records", "checks", "diagnose", "read"]

Check = Callable[[Records], Iterator[Finding]]


def diagnose(records: Records) -> list[Finding]:
  """All that is wrong, troubles before advice, without what follows from something else in it."""
  found = [finding for check in checks() for finding in check(records)]
  explained = {kind for finding in found for kind in finding.explains}
  causes = [finding for finding in found if finding.kind not in explained]
  return sorted(causes, key=lambda finding: finding.severity != "trouble")


def checks() -> list[Check]:
  """Every check there is."""
  modules = [
    importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
  ]
  return [
    function
    for module in modules
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
    if function.__annotations__.get("return") == Iterator[Finding]
  ]
