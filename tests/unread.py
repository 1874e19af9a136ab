"""A run with a NaN in step 11, of which process 1 cannot read a batch again to examine it."""

from bigtrain import Mesh, examine, processes
from tests import faulty


def put(*arguments, of_all=examine.put):
  if not processes.is_first():
    raise ValueError("a planted error")
  return of_all(*arguments)


examine.put = put


def base():
  e = faulty.nan_in_step_11()
  e.mesh = Mesh(data=-1, fsdp=1)
  return e
