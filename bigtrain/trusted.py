"""Folders whose contents are executed: nobody else may have written there."""

import os
import pathlib
import stat
from collections.abc import Iterator

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
  found, own = folder.stat(), os.geteuid()
  if found.st_uid != own:
    why = f"it belongs to user {found.st_uid}, and this is user {own}"
  elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    why = f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
  elif loose := next(filter(_is_loose, _way(folder)), None):
    why = f"others can replace it, as {loose} is theirs to change"
  else:
    return
  raise Refused(f"{folder} holds programs that are executed, but {why}; {remedy}")


def _way(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """What leads to a folder: those above it and each link on the way, with those above that."""
  at, names = pathlib.Path(folder.anchor), [*folder.parts[1:]]
  while names:
    yield at
    place = at / names.pop(0)
    if place.is_symlink():
      yield place
      names = [*place.readlink().parts, *names]  # If it is absolute, the first one is the root.
    else:
      at = at.parent if place.name == ".." else place


def _is_loose(place: pathlib.Path) -> bool:
  """Whether another user could put something else in the place of what it leads to."""
  found = place.lstat()
  # In a sticky folder, as /tmp is, only its owner can rename what lies there.
  loose = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
  mine = found.st_uid in (0, os.geteuid())
  return not mine or bool(loose and not stat.S_ISLNK(found.st_mode))
