"""bigtrain data: subcommands that make data ready for training."""

from bigtrain.config import Refused, config, nearest
from bigtrain.console import human, say

SUBCOMMANDS = {"prepare": "clean, deduplicate and split text files into shards"}


def data(arguments: list[str]) -> None:
  """bigtrain data SUBCOMMAND ..."""
  name, *rest = arguments or ["--help"]
  if name in ("-h", "--help"):
    print("usage: bigtrain data SUBCOMMAND [arguments]\n")
    print("\n".join(f"  {name:<10} {line}" for name, line in SUBCOMMANDS.items()))
    print("\nexample:    bigtrain data prepare experiments/data/austen.py --out prepared/austen")
    return
  if name not in SUBCOMMANDS:
    raise Refused(f"there is no command 'data {name}'{nearest(name, SUBCOMMANDS)}")
  globals()[f"_{name}"](rest)


@config
class PrepareFlags:
  """How a preparation is run."""

  out: str = ""  # The folder; prepared/<file>[-<function>] unless given.


def _prepare(arguments: list[str]) -> None:
  """bigtrain data prepare CONFIG.py[:function] --out DIR [overrides]."""
  from bigtrain.annotations import check_types
  from bigtrain.data.prepare.recipe import Prepare
  from bigtrain.data.prepare.run import prepare
  from bigtrain.flags import parse
  from bigtrain.load import load

  target = arguments[0] if arguments else ""
  about = "Flags of the command and fields of the config."
  if target in ("-h", "--help"):
    parse([PrepareFlags()], arguments, "bigtrain data prepare CONFIG.py[:function]", about)
  if not target or target.startswith("-"):
    raise Refused(
      "bigtrain data prepare takes CONFIG.py[:function] first: bigtrain data prepare "
      "experiments/data/austen.py"
    )
  recipe, source = load(target, Prepare)
  check_types(recipe)
  prog = f"bigtrain data prepare {target}"
  flags, recipe = parse([PrepareFlags(), recipe], arguments[1:], prog, about)
  out = flags.out or source.run_dir().replace("runs/", "prepared/", 1)
  manifest = prepare(recipe, out, source.file)
  if manifest is not None:
    splits = manifest["splits"]
    counts = ", ".join(f"{human(splits[s]['documents'])} {s}" for s in splits)
    say(f"{counts} documents in {out}; look at {out}/report.html")
