"""Words for people from where nothing may go wrong or wait: signal handlers, other threads."""

import os
import signal


def leaving() -> list[signal.Signals]:
  """The signals that tell a run to leave; not SIGHUP where it is ignored, as by nohup."""
  ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  return [signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,))]


def tell(text: str) -> None:
  """Writes a line on standard error, past all objects that another thread may hold.

  Where that cannot be written to, as when its terminal was closed, what is said goes nowhere from
  here on: a run does not end because nobody listens.
  """
  try:
    os.write(2, f"bigtrain: {text}\n".encode())
  except OSError:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
      os.dup2(nowhere, stream)
    os.close(nowhere)
