"""`bigtrain data fetch`: whole datasets by name, each file checked by its digest."""

import hashlib
import http.client
import inspect
import pathlib
import shutil
import tempfile
import urllib.request

from bigtrain.config import Refused, config, nearest
from bigtrain.console import Progress
from bigtrain.data.datasets import FASHION_MNIST, fetched
from bigtrain.data.sources import missing
from bigtrain.flags import parse
from bigtrain.hints import command as spelt

TIMEOUT = 30  # Seconds without a byte, after which the next mirror is tried.
CHUNK = 2**16  # Bytes.

# Of each dataset, the digests of its files and where the same files are published.
DATASETS = {
  "fashion_mnist": (
    FASHION_MNIST,
    (
      "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
  ),
}


@config
class Fetch:
  """Gets a whole dataset, from its publishers or from a folder.

  Files that are there and whole are not fetched again.
  """

  out: str | None = None  # A folder for the files; unless given, the one where sources look.
  source: str | None = None  # A folder that holds the files, in place of the network.


def command(arguments: list[str]) -> None:
  """bigtrain data fetch NAME [--out FOLDER] [--source FOLDER]."""
  rest = list(arguments)
  name = rest.pop(0) if rest and not rest[0].startswith("-") else None
  about = f"{inspect.getdoc(Fetch)}\n\nNAME is one of: {', '.join(DATASETS)}."
  [settings] = parse([Fetch()], rest, spelt(f"data fetch {name or 'NAME'}"), about)
  if name is None:
    raise Refused(
      "bigtrain data fetch takes the name of a dataset first: "
      + spelt(f"data fetch {next(iter(DATASETS))}")
    )
  print(fetch(name, settings))


def fetch(name: str, settings: Fetch) -> pathlib.Path:
  """The folder with all files of a dataset, each with the right digest.

  Raises:
    Refused: there is no such dataset, or a file cannot be had whole.
  """
  if name not in DATASETS:
    raise Refused(f"there is no dataset {name!r} to fetch{nearest(name, DATASETS)}")
  files, mirrors = DATASETS[name]
  if settings.source is not None and not pathlib.Path(settings.source).expanduser().is_dir():
    raise Refused(f"--source: {missing(settings.source)}; give a folder with {', '.join(files)}")
  out = fetched(name) if settings.out is None else pathlib.Path(settings.out).expanduser()
  out.mkdir(parents=True, exist_ok=True)
  for file, digest in files.items():
    if not (out / file).exists() or _digest(out / file) != digest:
      _get(file, digest, out, settings.source, mirrors)
  return out


def _get(file: str, digest: str, out: pathlib.Path, source: str | None, mirrors) -> None:
  """Puts a file into `out`, under its name only once its digest is right."""
  places = mirrors if source is None else [f"{pathlib.Path(source).expanduser().resolve()}/"]
  tried = []
  for place in places:
    with tempfile.TemporaryDirectory(dir=out) as folder:
      got = pathlib.Path(folder) / file
      try:
        _copy(place + file, got)
      except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        tried.append(f"{place}{file}: {getattr(reason, 'strerror', None) or reason}")
        continue
      if (found := _digest(got)) == digest:
        got.replace(out / file)
        return
      tried.append(f"{place}{file}: is another file or damaged (SHA-256 {found[:12]}...)")
  remedy = "; without a network, `--source FOLDER` takes the files from a folder"
  raise Refused("; ".join(tried) + remedy * (source is None))


def _copy(place: str, to: pathlib.Path) -> None:
  if "://" not in place:
    shutil.copyfile(place, to)
    return
  with urllib.request.urlopen(place, timeout=TIMEOUT) as answer, to.open("wb") as file:
    total = int(answer.headers.get("Content-Length") or 0)
    with Progress(to.name, total) as progress:
      while chunk := answer.read(CHUNK):
        file.write(chunk)
        progress.advance(len(chunk))


def _digest(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()
