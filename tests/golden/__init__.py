"""Stored outputs of other libraries, and how to read them. Their makers are in tools/golden."""

import hashlib
import json
import pathlib

import numpy as np


def read(name: str) -> dict[str, np.ndarray]:
  """The arrays of a golden file, checked against its digest."""
  with np.load(pathlib.Path(__file__).parent / f"{name}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  about = json.loads(str(arrays.pop("about")))
  found = hashlib.sha256()
  for key in sorted(arrays):
    found.update(f"{key} {arrays[key].shape}".encode() + arrays[key].tobytes())
  assert found.hexdigest() == about["sha256"], f"{name}.npz is not what its maker wrote"
  return arrays
