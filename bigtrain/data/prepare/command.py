"""`bigtrain data prepare CONFIG.py[:function] --out DIR [overrides]`."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from bigtrain.annotations import check_types
from bigtrain.config import Refused, config
from bigtrain.console import human, say
from bigtrain.exit_codes import Exit
from bigtrain.flags import parse
from bigtrain.hints import command as spelt

EXAMPLE = "data prepare experiments/data/austen.py --out prepared/austen"


@config
class PrepareFlags:
  """Where the result goes."""

  out: str = ""  # The folder; prepared/<file>[-<function>] unless given.


def command(arguments: list[str]) -> None:
  """Prepares text, or goes on with a folder that was begun."""
  from bigtrain.data.prepare.recipe import Prepare
  from bigtrain.data.prepare.run import prepare
  from bigtrain.load import load

  target = arguments[0] if arguments else ""
  about = (
    "Reads text files as CONFIG.py says, cleans them, takes out duplicates and what is of low "
    "quality, splits the rest, and writes shards to train on and a report. The same command goes "
    "on where an earlier one was stopped."
  )
  if target in ("-h", "--help"):
    about += " `bigtrain data prepare CONFIG.py --help` also lists the fields of that config."
    parse([PrepareFlags()], arguments, "bigtrain data prepare CONFIG.py[:function]", about)
  if not target or target.startswith("-"):
    raise Refused(
      f"bigtrain data prepare takes CONFIG.py[:function] first: {spelt(EXAMPLE, extra='data')}"
    )
  recipe, source = load(target, Prepare)
  check_types(recipe)
  prog = spelt(f"data prepare {target}", extra="data")
  flags, recipe = parse([PrepareFlags(), recipe], arguments[1:], prog, about)
  out = flags.out or source.run_dir().replace("runs/", "prepared/", 1)
  with leaving():
    manifest = prepare(recipe, out, source.file)
  if manifest is not None:
    splits = manifest["splits"]
    counts = ", ".join(f"{human(splits[s]['documents'])} {s}" for s in splits)
    say(f"{counts} documents in {out}; look at {out}/report.html")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """In here, Ctrl-C and SIGTERM end the process at once, with a word on how to go on.

  Nothing is closed: what is on disk survives a kill at any moment.
  """
  own = os.getpid()
  shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # The cursor, which bars hide.

  def stop(number: int, frame) -> None:
    if os.getpid() == own:  # Not a fork of it.
      os.write(2, f"{shown}bigtrain: stopped; the same command goes on\n".encode())
    os._exit(Exit.LEFT)

  # Python's tracker of resources clears up after this process, and need not warn of it.
  os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
  before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
