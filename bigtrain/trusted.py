"""Folders whose contents are executed: nobody else may have written there."""

import os
import pathlib
import stat

from bigtrain.config import Refused


def check_own(path: str | os.PathLike, remedy: str) -> None:
  """Refuses a folder that is not this user's own, or in which others can put or replace files.

  What a bucket holds is for its own permissions to guard: a path with a scheme is not looked at.

  Args:
    path: the folder; where it is missing, it is made for this user alone.
    remedy: what to do, for the message.
  """
  if "://" in os.fspath(path):
    return
  folder = pathlib.Path(os.path.abspath(path))
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  except OSError as error:
    raise Refused(f"{folder} cannot be made: {error.strerror}; {remedy}") from error
  # A link could be changed later, by whoever can write where it lies.
  for place in {folder.resolve(), folder}:
    _check(place, remedy)


def _check(folder: pathlib.Path, remedy: str) -> None:
  found, own = folder.stat(), os.geteuid()
  if found.st_uid != own:
    why = f"it belongs to user {found.st_uid}, and this is user {own}"
  elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    why = f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
  elif replaceable := _replaceable(folder):
    why = f"others can replace it, as {replaceable} is theirs to change"
  else:
    return
  raise Refused(f"{folder} holds programs that are executed, but {why}; {remedy}")


def _replaceable(folder: pathlib.Path) -> pathlib.Path | None:
  """The nearest folder above in which another user could put another folder in its place."""
  for above in folder.parents:
    found = above.stat()
    # In a sticky folder, as /tmp is, only its owner can rename what lies there.
    loose = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if loose or found.st_uid not in (0, os.geteuid()):
      return above
  return None
