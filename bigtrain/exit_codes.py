"""The exit codes of every command: the one table."""

import enum


class Exit(enum.IntEnum):
  DONE = 0
  FAILED = 1  # Anything that no other code names.
  REFUSED = 2  # An input was refused before any work.
  LEFT = 3  # Left on a signal, saved unless told to hurry; the same command goes on.
  CHECK = 4  # A check failed: parity, replay, verification.
  DEADLINE = 5  # A deadline passed.


UNHELPED = (Exit.REFUSED, Exit.CHECK)  # What the same command gives again, however often.
