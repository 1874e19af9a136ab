"""What a fault did: a line of the results file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass
class Result:
  fault: str  # Its kind, a row of the table.
  seed: int
  happened: str
  kept: bool  # Whether what is promised of it was kept.
  recovery: float = 0.0  # Seconds from the start behind the fault until all was as before.
  lost: int = 0  # Rows, or verified steps, that were not there any more.
  repeated: int = 0  # Rows that are there twice, or are others than those of an undisturbed run.
  again: int = 0  # Steps that were computed a second time, beyond the checkpoint.

  def append(self, path: Path) -> None:
    with path.open("a") as file:
      file.write(json.dumps(dataclasses.asdict(self)) + "\n")


def compared(rows: Sequence[str], expected: Sequence[str]) -> dict[str, int]:
  """What is wrong with the rows of a run, as fields of a result."""
  return {
    "lost": len(set(expected) - set(rows)),
    "repeated": len(rows) - len(set(rows) & set(expected)),
  }
