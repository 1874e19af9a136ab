"""The exit codes of every command: the one table."""

import enum


class Exit(enum.IntEnum):
  DONE = 0
  FAILED = 1  # Anything that no other code names.
  REFUSED = 2  # An input was refused before any work.
  LEFT = 3  # Saved and left on a signal; the same command goes on from there.
  CHECK = 4  # A check failed: parity, replay, verification.
  DEADLINE = 5  # A deadline passed.
