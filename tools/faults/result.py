"""What a fault did: a line of the results file."""

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass
class Result:
  fault: str  # Its kind, a row of the table.
  seed: int
  happened: str
  kept: bool  # Whether what is promised of it was kept.
  recovery: float = 0.0  # Seconds from the start behind the fault until all was as before.
  lost: int = 0  # Verified steps that were not there any more.

  def append(self, path: Path) -> None:
    with path.open("a") as file:
      file.write(json.dumps(dataclasses.asdict(self)) + "\n")
